"""The plan before a run: sizes are the real model's, and what does not fit is refused with settings that fit."""

import re
import shutil

import pytest
import torch
from conftest import SENTENCES, make_vla, one_sentence, refused
from transformers import Blip2Config

from common.cpus import usable_cpus
from common.files import write_json
from stage0_sft import Args
from tools import plan
from tools.costs import vla_costs


def test_numbers_of_the_stages_are_checked_first():
    """A stage would refuse them hours later."""
    for words in (
        {"stage0": "--accumulate 0"},
        {"rl": "--envs 0"},
        {"sft": "--lr nan"},
        {"rounds": -1},
    ):
        assert "must be" in refused(plan.Plan, plan.Args("toy", **words))


def counted(vla, vlm):
    """Return the plan's sizes of a VLA that `make_vla` made, from its VLM's configuration alone."""
    args = Args("bead", "", vlm=vlm, image_size=32, lora_rank=4, dtype="float32")
    return vla_costs(vla.blip.config, args, 2, SENTENCES)


def test_sizes_are_the_real_models(tmp_path, backbone):
    """Parameters, theta, bytes and latents by the configuration are those of the weights, with and without LoRA."""
    for vlm in ("tiny", backbone):
        vla = make_vla(tmp_path, vlm)
        costs = counted(vla, vlm)
        assert costs.parameters == sum(
            p.numel() for n, p in vla.vlm.named_parameters() if "lora_" not in n
        )
        assert costs.theta == sum(p.numel() for p in vla.theta())
        assert costs.phi == sum(p.numel() for p in vla.phi())
        assert costs.weights == sum(p.nbytes for p in [*vla.vlm.parameters(), *vla.phi()])
        h, _ = vla.encode(torch.zeros(1, 32, 32, 3).byte(), SENTENCES[:1])
        assert costs.width == h.shape[2] and abs(costs.tokens - h.shape[1]) <= 1


@pytest.mark.parametrize("how", ["plain", "checkpointing", "head alone"])
def test_activations_are_close_to_what_autograd_keeps(how, tmp_path):
    """The estimate is at least what one sample really leaves for the backward pass, and at most three times that."""
    vla = make_vla(tmp_path)
    trains_vlm = how != "head alone"
    estimate = counted(vla, "tiny").activation_bytes(trains_vlm, how == "checkpointing")
    if how == "checkpointing":
        vla.enable_gradient_checkpointing()
    for p in vla.vlm.parameters():
        p.requires_grad_(trains_vlm)
    own = {x.untyped_storage().data_ptr() for x in [*vla.parameters(), *vla.buffers()]}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        vla(torch.zeros(8, 32, 32, 3).byte(), SENTENCES[:1] * 8)
    sample = sum(x.nbytes for key, x in kept.items() if key not in own) / 8
    upper = (
        8 if how == "checkpointing" else 3
    )  # the hook does not see the layer that is computed again
    assert sample < estimate < upper * sample


def test_economies_take_less(backbone):
    """--checkpointing, LoRA on the language model alone and a frozen VLM each lower the estimate."""
    config = Blip2Config.from_pretrained(backbone)
    everywhere, language = (
        vla_costs(
            config,
            Args("bead", "", vlm=backbone, dtype="float32", lora_targets=targets),
            2,
            SENTENCES,
        )
        for targets in ("all", "language")
    )
    plain = everywhere.activation_bytes(True)
    assert everywhere.activation_bytes(True, checkpointing=True) < plain
    assert language.activation_bytes(True) < plain and language.theta < everywhere.theta
    assert everywhere.activation_bytes(False) < language.activation_bytes(True)
    assert everywhere.trained_bytes(False) < everywhere.trained_bytes(True)


def test_the_plan_reports_what_a_run_takes(project):
    """For the default VLM: stages, memory of each, disk, speed and minutes. Nothing is written."""
    out = project.must("python", "-m", "tools.plan", "--domain", "bead", "--run", "runs/planned")
    parts = [
        "0-sft  1-rl-blue  1-sft",
        f"CPU, {usable_cpus()} cores",
        f"{usable_cpus()} processes that record D_e",
    ]
    parts += ["stage 0: weights", "RL: weights", "PPO's rollout", "stage 2: weights", "disk: D_e"]
    parts += ["images/s", "minutes: D_e"]
    for part in parts:
        assert part in out, out
    assert not (project.folder / "runs/planned").exists()


def test_plan_before_the_weights_are_here(project, backbone, tmp_path):
    """A VLM of which there is only the configuration is planned too, without minutes."""
    folder = tmp_path / "vlm"
    shutil.copytree(backbone, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    command = [
        "python",
        "-m",
        "tools.plan",
        "--domain",
        "bead",
        "--run",
        "runs/planned",
        "--vlm",
        folder,
    ]
    out = project.must(*command)
    assert "stage 2: weights" in out and "minutes: not measured" in out
    (folder / "config.json").unlink()
    assert str(folder) in one_sentence(project.run(*command))


def test_what_does_not_fit_is_refused(project, tmp_path, monkeypatch):
    """Memory and disk, in one sentence; the settings that it names fit."""
    command = ["python", "-m", "tools.plan", "--domain", "bead", "--run", "runs/planned"]
    sentence = one_sentence(project.run(*command, "--stage0=--batch 5000000"))
    assert "stage 0" in sentence and "GB" in sentence
    project.must(
        *command, f"--stage0=--batch 5000000 {re.search('--accumulate [0-9]+', sentence)[0]}"
    )
    monkeypatch.chdir(tmp_path)
    assert "--rollout" in refused(plan.main, plan.Args("metaworld", rl="--rollout 50000000"))
    assert "--demos" in refused(plan.main, plan.Args("metaworld", stage0="--demos 500000000"))
    assert "--threads" in refused(plan.main, plan.Args("metaworld", stage0="--threads 500000"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_would_miss_its_demonstrations_is_refused(tmp_path, capsys):
    """If a task of D_e is missing and stage 0 is done, the plan names the command that records it again.

    Stage 0 accepts that command: its --demos is no lower than what a task has. A task with too few
    is reported.
    """
    make_vla(tmp_path, domain="kitchen").save(tmp_path / "run/0-sft")
    other = tmp_path / "D_e/kitchen/light-on/000000.safetensors"
    other.parent.mkdir(parents=True)
    other.touch()
    sentence = refused(
        plan.main, plan.Args("kitchen", run=str(tmp_path / "run"), data=str(tmp_path / "D_e"))
    )
    assert str(tmp_path / "D_e/kitchen/knob-on") in sentence
    assert "stage0_sft.py" in sentence and "--steps 0" in sentence
    assert "--demos 50 " in sentence
    assert "fewer than 50 episodes, such as light-on with 1" in capsys.readouterr().out
    for i in range(60):
        other.with_name(f"{i:06d}.safetensors").touch()
    args = plan.Args("kitchen", run=str(tmp_path / "run"), data=str(tmp_path / "D_e"))
    assert "--demos 60 " in refused(plan.main, args)


def test_finished_stages_are_not_planned_again(tmp_path):
    """What is left is the order of Algorithm 1 without the finished stages; round i takes the i-th RL task."""
    run = tmp_path / "run"
    (run / "1-rl-button-press-new").mkdir(parents=True)
    write_json(run / "0-sft/config.json", {"vlm": "a/b"})
    todo = plan.Plan(
        plan.Args("metaworld", rounds=2, run=str(run), rl="--env-steps 7", stage0="--dtype float32")
    )
    assert todo.left == ["1-sft", "2-rl-drawer-open-new", "2-sft"]
    assert (todo.count("0-sft"), todo.count("rl"), todo.count("sft")) == (0, 1, 2)
    assert todo.env_steps == 7 and todo.vlm == "a/b"
    assert todo.missing_demos() == 25 * 100  # stage 2 records them if there are none at all
    new = str(tmp_path / "new")
    assert plan.Plan(plan.Args("metaworld", rounds=0, run=new)).left == ["0-sft"]
    todo = plan.Plan(plan.Args("metaworld", method="sft-only", run=new))
    assert todo.left == ["0-sft", "1-sft", "2-sft", "3-sft", "4-sft", "5-sft"]
