"""The redesign changed no number: a short run of all stages ends with the weights of the build before it."""

import subprocess
import sys

import pytest
import torch
from conftest import BEAD, ROOT, Project, command
from safetensors import safe_open

BEFORE = "c944600"  # the last commit with the old names
OLD_NAMES = {  # of a domain's constants
    "RL_ALGORITHM": "ALGO",
    "NUM_VIEWS": "VIEWS",
    "ACTION_NOISE_STD": "NOISE",
    "RANDOM_BURST_PROB": "KICKS",
    "DEMOS_PER_TASK": "DEMOS",
    "STAGE0_STEPS": "STEPS",
}


def short_run():
    """Return the commands of stage 0, PPO, stage 2, PPO-Replay and SACfD on the bead."""
    first = {
        "domain": "bead",
        "out": "runs/a/0-sft",
        "steps": 40,
        "demos": 12,
        "batch": 64,
        "image_size": 32,
    }
    ppo = {
        "domain": "bead",
        "task": "blue",
        "rollout": 32,
        "minibatch": 64,
        "warmup": 1,
        "threads": 1,
    }
    sacfd = {
        "domain": "bead",
        "task": "blue",
        "algo": "sacfd",
        "env_steps": 600,
        "envs": 2,
        "successes": 2,
    }
    start = {
        "parent": "runs/a/0-sft",
        "out": "runs/a/1-rl-blue",
        "env_steps": 3000,
        "envs": 6,
        "successes": 4,
    }
    replay = {
        "parent": "runs/a/1-sft",
        "out": "runs/a/2-rl-blue",
        "env_steps": 600,
        "envs": 4,
        "successes": 2,
    }
    second = {"parent": "runs/a/1-rl-blue", "out": "runs/a/1-sft", "steps": 30, "batch": 64}
    robot = {"parent": "runs/a/1-sft", "out": "runs/s/1-rl-blue", "episodes": 0, "threads": 1}
    return [
        command("stage0_sft.py", **first, episodes=2, threads=1),
        command("stage_rl.py", **ppo, **start, episodes=2),
        command("stage_sft.py", **second, episodes=2, threads=1),
        command("stage_rl.py", **ppo, **replay, episodes=0, train_vlm=True, algo="ppo"),
        command("stage_rl.py", "--sacfd.warmup", 100, **sacfd, **robot),
    ]


def tensors(folder):
    """Return {(file, name): tensor} of all safetensors files under a folder. A header on disk has no fixed order."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  it is not a dict
                found[str(path.relative_to(folder)), name] = f.get_tensor(name)
    return found


@pytest.mark.slow
def test_same_weights_as_before_the_redesign(tmp_path):
    """Stages 0, 1 and 2, PPO-Replay and SACfD write the same episodes and weights as commit c944600, bit for bit."""
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"{BEFORE} is not in this clone")
    old = tmp_path / "old"
    new = tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    subprocess.run(["tar", "x", "-C", old], input=archive.stdout, check=True)
    bead = BEAD
    for name, before in OLD_NAMES.items():
        bead = bead.replace(name, before)
    (old / "domains/bead.py").write_text(bead)
    project = Project(new)
    # Short runs of SFT have had another warm-up and average since. Long ones have not.
    stage0 = new / "stage0_sft.py"
    stage0.write_text(stage0.read_text().replace("SHORT_RUN = 1000", "SHORT_RUN = 0"))
    for words in short_run():
        for folder in (old, new):
            process = project.start(
                *words, cwd=folder, OMP_WAIT_POLICY="PASSIVE", python=sys.executable
            )
            _, err = process.communicate(timeout=900)
            assert process.returncode == 0, err[-3000:]
    before = tensors(old / "runs")
    after = tensors(new / "runs")
    assert before.keys() == after.keys() and len(before) > 500
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    assert not differ
