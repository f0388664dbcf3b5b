"""What the tests share: a copy of the project to run things in, a toy domain with known optimum, small checkpoints."""

import atexit
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from data import ONLINE_SEED, Episodes, attempts, open_episode, write_episode  # noqa: E402
from evaluate import all_tasks  # noqa: E402
from model import VLA, build_tiny  # noqa: E402
from run import alone_in  # noqa: E402

TOY = '''
"""A bead on a line, shown as brightness: push it to the middle. Solved in at most 4 of 8 decisions by the optimum."""
import gymnasium as gym
import numpy as np

INSTRUCTIONS = {colour: f"push the {colour} bead" for colour in ("red", "green", "blue")} | {"grey": "push"}
EXPERT_TASKS, RL_TASKS, UNSEEN_TASKS = ["red", "green"], ["blue"], ["grey"]
CHANNELS = {"red": [0], "green": [1], "blue": [2], "grey": [0, 1, 2]}
PROTOCOL = {"horizon": 8}
ALGO, VIEWS = "ppo", 1
NOISE, KICKS, STEPS, DEMOS = 0.2, 0.05, 100, 2


class Toy(gym.Env):
    def __init__(self, task, image_size):
        self.task, self.size = task, image_size
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def picture(self):
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[..., CHANNELS[self.task]] = round(128 + 100 * np.clip(self.x, -1.2, 1.2))
        return image

    render = picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(0.2, 1) * self.np_random.choice([-1, 1]), 0
        return self.picture(), {}

    def step(self, action):
        self.x, self.t = self.x + 0.3 * float(action[0]), self.t + 1
        success = abs(self.x) < 0.15
        return self.picture(), float(success), success, self.t >= 8, {}


def make(task, image_size=64):
    return Toy(task, image_size)


def expert(env):
    return np.array([np.clip(-env.unwrapped.x / 0.3, -1, 1), 0], np.float32)
'''


class Project:
    """A copy of the project's files in `folder`, with the domain `toy` beside its own."""

    def __init__(self, folder):
        self.folder = folder
        for name in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
            shutil.copy(name, folder)
        shutil.copytree(ROOT / "domains", folder / "domains", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "domains/toy.py").write_text(TOY)

    def start(self, *command, python=sys.executable, **env):
        """A command as a process group of its own, as a terminal starts it; Python commands by this interpreter."""
        command = [python if part == "python" else str(part) for part in command]
        # PASSIVE: threads that spin while they wait crawl where other work has one of the cores
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHON": python, "PYTHONWARNINGS": "ignore", **env}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        terminal = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        return subprocess.Popen(command, cwd=self.folder, env=env, **terminal, **pipes)  # xdist's workers ignore SIGINT

    def run(self, *command, timeout=900, **env):
        """Runs a command to its end: (exit code, stdout, stderr). Python is one that has its imports behind it."""
        process = self.start(*command, python=warm_python(), **env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                kill(process, signal.SIGKILL)
        return process.returncode, out, err

    def must(self, *command, **env):
        """Runs a command that has to succeed: its stdout."""
        code, out, err = self.run(*command, **env)
        assert code == 0, f"{command} ended with {code}:\n{out[-3000:]}\n{err[-3000:]}"
        return out


@functools.cache
def warm_python():
    """An executable for warm.py, with a server that ends when this process does."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder)
    script, server, wrapper = ROOT / "tests/warm.py", folder / "server", folder / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{script}" "{server}" "$@"\n')
    wrapper.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, script, "--serve", server], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    atexit.register(process.stdin.close)
    while not server.exists():
        assert process.poll() is None, "tests/warm.py does not start"
        time.sleep(0.05)
    return str(wrapper)


def kill(process, number):
    """Sends a signal to all of a process group, as a terminal does."""
    os.killpg(process.pid, number)
    return process


def files(folder):
    """Every file under `folder`, by its relative path, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(story, *args):
    """The one sentence with which a command ends for `story(*args)`; fails unless it ends so."""
    import run

    with pytest.raises(SystemExit) as end:
        run.main(lambda _: story(*args), None)
    sentence = end.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(sentence, str) and sentence.startswith("error: ") and "\n" not in sentence, sentence
    return sentence


def make_vla(folder, vlm="tiny", **changes):
    """A new small float32 VLA, without a stage around it."""
    settings = dict(
        instructions=["push the red bead", "push the green bead", "push the blue bead", "push"],
        action_dim=2, domain="toy", image_size=32, lora_rank=4, lora_targets="all", dtype="float32",
    )  # fmt: skip
    return VLA.create(vlm, folder=folder, **{**settings, **changes})


STAGE_FILES = {"config.json", "heads.safetensors", "vlm/model.safetensors", "log.jsonl", "eval.json", "summary.json"}


def leftovers(folder):
    """What a finished command must not leave behind."""
    return [p for p in folder.rglob("*") if re.search(r"^\.|tmp|partial|state", p.name)]


def check_run(folder, domain, stages, demos, data):
    """Everything that a finished run consists of is there and readable, and nothing else is."""
    name = domain.__name__.split(".")[-1]
    run = folder / "runs" / f"{name}-seed0-smoke"
    assert sorted(p.name for p in run.iterdir()) == sorted([*stages, "D_rl", "report.json", "report.md", "report.png"])
    for stage in stages:
        assert not STAGE_FILES - set(files(run / stage)), stage
        assert VLA.load(run / stage, name).config["domain"] == name
        steps = [json.loads(line)["step"] for line in (run / stage / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), f"{stage}/log.jsonl repeats itself"
        assert set(json.loads((run / stage / "eval.json").read_text())["tasks"]) == set(all_tasks(domain))
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == stages and report["domain"] == name
    for stage in report["stages"]:
        assert sum(split["episodes"] for split in stage["splits"].values()) == len(all_tasks(domain))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(s in (run / "report.md").read_text() for s in stages)
    assert [s for s in stages if (run / s / "README.md").exists()] == stages[-1:]  # the model card
    assert stages[-1] in (run / stages[-1] / "README.md").read_text()
    assert not leftovers(folder / "runs")
    for task in domain.EXPERT_TASKS:
        assert len(attempts(data / task)) >= demos, task
    frames = {data: 0, run / "D_rl": 0}
    for folder in frames:
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            handle, header = open_episode(path)
            assert header["success"] == "1" and handle.get_tensor("reward")[-1] == 1
            assert int(header["seed"]) % ONLINE_SEED == int(path.stem)
            frames[folder] += len(handle.get_tensor("reward"))
    trained_on = {s: json.loads((run / s / "summary.json").read_text()).get("frames") for s in stages}
    assert trained_on["0-sft"] == frames[data]  # Eq. 2
    assert trained_on["1-sft"] == sum(frames.values())  # Eq. 4; Meta-World's smoke loop has no success to add
    return run


def episodes(folder):
    """What the episode files under a folder hold (safetensors' header has no fixed order): {path: content}."""
    opened = {p.relative_to(folder): open_episode(p) for p in Path(folder).rglob("*.safetensors")}
    names = ("image", "action", "reward")
    return {p: (header, *(handle.get_tensor(n).tobytes() for n in names)) for p, (handle, header) in opened.items()}


def write_d_e(root, toy, episodes=3, T=5):
    """Episodes of noise for the toy domain's expert tasks."""
    rng = np.random.default_rng(0)
    for task in toy.EXPERT_TASKS:
        for k in range(episodes):
            write_episode(
                root / task / f"{k:06d}.safetensors", rng.integers(0, 256, (T, 32, 32, 3)), rng.uniform(-1, 1, (T, 2)),
                np.eye(T)[-1], domain="toy", task=task, instruction=toy.INSTRUCTIONS[task], source="expert", seed=k,
                protocol=toy.PROTOCOL,
            )  # fmt: skip
    return lambda: Episodes({root / task: 1.0 for task in toy.EXPERT_TASKS}, toy, 32)


def pytest_collection_modifyitems(items):
    """The longest test first, that the last process has not to wait for it."""
    items.sort(key=lambda item: item.name != "test_smoke_loop_on_metaworld")


@pytest.fixture(autouse=True)
def seeded():
    """Random weights are the same in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def toy(project):
    """The toy domain's module, for this process."""
    spec = importlib.util.spec_from_file_location("domains.toy", project.folder / "domains/toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(project):
    """An untrained checkpoint of the toy domain: runs/start, to be copied before it is changed."""
    torch.manual_seed(0)
    folder = project.folder / "runs/start"
    make_vla(folder).save(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A small BLIP-2 folder in HF's layout, such as a user gives as --vlm: LoRA adapts it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbone")
    build_tiny(folder, ["push the red bead", "push the green bead", "push the blue bead", "push"], image_size=32)
    return str(folder)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A toy project in which the smoke loop has run once from beginning to end, and how long that took. The first test
    process that needs it runs it; each has a copy."""
    project, base = Project(tmp_path_factory.mktemp("undisturbed")), tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    with alone_in(shared):
        if not (shared / "seconds").exists():
            began = time.time()
            project.must("bash", "loop.sh", "toy", "1", SMOKE="1")
            shutil.copytree(project.folder / "runs", shared / "runs")
            (shared / "seconds").write_text(str(time.time() - began))
    shutil.copytree(shared / "runs", project.folder / "runs", dirs_exist_ok=True)
    return project, float((shared / "seconds").read_text())
