"""Shared by the tests: a copy of the project to run commands in, a tiny domain, small checkpoints."""

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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# A suite started with nohup, or with & in a script, ignores these; so would all that it starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from common.backbone import build_tiny
from common.episode_file import ONLINE_SEED, EpisodeInfo, episode_ids, open_episode, write_episode
from common.errors import run_cli
from common.files import folder_lock
from common.rates import all_tasks, splits
from data import EpisodeDataset
from model import VLA, VLAConfig

# An environment costs microseconds here, and its optimum is known. Stages of other domains take minutes.
BEAD = '''
"""A bead on a line, shown as brightness: push it to the middle. The optimum takes at most 4 of 8 environment steps."""

import gymnasium as gym
import numpy as np

NAME = "bead"
INSTRUCTIONS = {colour: f"push the {colour} bead" for colour in ("red", "green", "blue")} | {"grey": "push"}
EXPERT_TASKS = ["red", "green"]
RL_TASKS = ["blue"]
UNSEEN_TASKS = ["grey"]
CHANNELS = {"red": [0], "green": [1], "blue": [2], "grey": [0, 1, 2]}
PROTOCOL = {"horizon": 8}
RL_ALGORITHM = "ppo"
NUM_VIEWS = 1
ACTION_NOISE_STD = 0.2
RANDOM_BURST_PROB = 0.05
DEMOS_PER_TASK = 2
STAGE0_STEPS = 100
STAGE2_STEPS = 1400
SFT_BATCH = 256


class Bead(gym.Env):
    def __init__(self, task, image_size):
        self.task, self.size = task, image_size
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def render(self):
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[..., CHANNELS[self.task]] = round(128 + 100 * np.clip(self.x, -1.2, 1.2))
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(0.2, 1) * self.np_random.choice([-1, 1]), 0
        return self.render(), {}

    def step(self, action):
        self.x, self.t = self.x + 0.3 * float(action[0]), self.t + 1
        success = abs(self.x) < 0.15
        return self.render(), float(success), success, self.t >= 8, {}


def make(task, image_size=64):
    return Bead(task, image_size)


def expert(env):
    return np.array([np.clip(-env.unwrapped.x / 0.3, -1, 1), 0], np.float32)
'''
SENTENCES = [
    "push the red bead",
    "push the green bead",
    "push the blue bead",
    "push",
]  # the bead's instructions
FOLDERS = ("common", "domains", "robot", "tools")


class Project:
    """A copy of the project's files in `folder`, and the domain `bead`."""

    def __init__(self, folder: Path):
        self.folder = folder
        for pattern in ("*.py", "*.sh", "requirements*.txt"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        for name in FOLDERS:
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        (folder / "domains/bead.py").write_text(BEAD)

    def start(
        self, *command, python: str = sys.executable, cwd: Path | None = None, **env: str
    ) -> subprocess.Popen:
        """Start a command as a process group of its own, as a terminal does; Python commands by `python`."""
        command = [python if part == "python" else str(part) for part in command]
        env = {**os.environ, "PYTHON": python, "PYTHONWARNINGS": "ignore", **env}
        return subprocess.Popen(
            command,
            cwd=cwd or self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # xdist's workers ignore SIGINT
        )

    def run(self, *command, timeout: float = 900, **more) -> tuple[int, str, str]:
        """Run a command to its end and return (exit code, stdout, stderr). Its Python has made its imports already."""
        process = self.start(*command, python=warm_python(), **more)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                kill(process, signal.SIGKILL)
        return process.returncode, out, err

    def must(self, *command, **more) -> str:
        """Run a command that has to succeed, and return its stdout."""
        code, out, err = self.run(*command, **more)
        assert code == 0, f"{command} ended with {code}:\n{out[-3000:]}\n{err[-3000:]}"
        return out


def command(script: str, *more, **flags) -> list[str]:
    """Return a command: command("a.py", "--b.c", 1, env_steps=2) is python a.py --env-steps 2 --b.c 1."""
    words = ["python", script]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words + [str(word) for word in more]


@functools.cache
def warm_python() -> str:
    """Return the path of an executable for warm.py. Its server ends when this process does."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder)
    script = ROOT / "tests/warm.py"
    server = folder / "server"
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{script}" "{server}" "$@"\n')
    wrapper.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, script, "--serve", server],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    atexit.register(process.stdin.close)
    while not server.exists():
        assert process.poll() is None, "tests/warm.py does not start"
        time.sleep(0.05)
    return str(wrapper)


def kill(process: subprocess.Popen, number: int) -> subprocess.Popen:
    """Send a signal to all of a process group, as a terminal does."""
    os.killpg(process.pid, number)
    return process


def files(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of every file under `folder`."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def refused(function: Callable, *args) -> str:
    """Return the one sentence with which a command ends that calls `function(*args)`. Fails unless it ends so."""
    with pytest.raises(SystemExit) as end:
        run_cli(lambda _: function(*args), None)
    sentence = end.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(sentence, str) and sentence.startswith("error: ") and "\n" not in sentence, (
        sentence
    )
    return sentence


def one_sentence(result: tuple[int, str, str]) -> str:
    """Return the sentence on stderr of a command that was refused. Fails if there is a traceback."""
    code, out, err = result
    assert code not in (0, None) and "Traceback" not in out + err, err
    errors = re.findall(r"error: .+", err)  # a progress bar may precede it
    assert len(errors) == 1, err
    return errors[0]


def make_vla(folder: Path, vlm: str = "tiny", words: list[str] = SENTENCES, **changes) -> VLA:
    """Return a new small float32 VLA, without a stage around it."""
    settings = {
        "vlm": vlm,
        "domain": "bead",
        "action_dim": 2,
        "image_size": 32,
        "dtype": "float32",
        "lora_rank": 4,
        "lora_targets": "all",
    }
    return VLA.create(VLAConfig(**{**settings, **changes}), words, folder)


def nan_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Write a copy of a checkpoint whose head holds NaN, and return its folder."""
    vla = VLA.load(checkpoint)
    vla.head.mlp[0].bias.data.fill_(float("nan"))
    vla.save(folder)
    return folder


def without_digests(folder: Path) -> Path:
    """Remove the digests from a checkpoint's config.json, as in an older one, and return the folder."""
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def randomise(parameters) -> None:
    """Change weights at random: new LoRA weights change nothing until then."""
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))


STAGE_FILES = {
    "config.json",
    "heads.safetensors",
    "vlm/model.safetensors",
    "log.jsonl",
    "eval.json",
    "summary.json",
}


def leftovers(folder: Path) -> list[Path]:
    """Return the files and folders that a finished command must not leave behind."""
    return [p for p in folder.rglob("*") if re.search(r"^\.|tmp|partial|state", p.name)]


def evaluated(stage: str, domain: ModuleType) -> list[str]:
    """Return the tasks that a stage is evaluated on: stage 1 on its own."""
    return [stage.split("-rl-")[1]] if "-rl-" in stage else all_tasks(domain)


def check_run(folder: Path, domain: ModuleType, stages: list[str], demos: int, data: Path) -> Path:
    """Check that all files of a finished smoke run are there and readable, and no others. Return the run's folder."""
    name = domain.NAME
    run = folder / "runs" / f"{name}-seed0-smoke"
    reports = ["D_rl", "report.json", "report.md", "report.png", "video.mp4"]
    assert sorted(p.name for p in run.iterdir()) == sorted([*stages, *reports])
    for stage in stages:
        assert not STAGE_FILES - set(files(run / stage)), stage
        assert VLA.load(run / stage, name).config["domain"] == name
        steps = [
            json.loads(line)["step"]
            for line in (run / stage / "log.jsonl").read_text().splitlines()
        ]
        assert steps == sorted(set(steps)), f"{stage}/log.jsonl repeats itself"
        assert list(json.loads((run / stage / "eval.json").read_text())["tasks"]) == evaluated(
            stage, domain
        )
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == stages and report["domain"] == name
    for stage in report["stages"]:
        assert list(stage["tasks"]) == list(stage["outcomes"]) == evaluated(stage["name"], domain)
        whole = [
            split for split, tasks in splits(domain).items() if set(tasks) <= set(stage["tasks"])
        ]
        assert list(stage["splits"]) == whole
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(s in (run / "report.md").read_text() for s in stages)
    assert b"ftyp" in (run / "video.mp4").read_bytes()[:12]
    assert [s for s in stages if (run / s / "README.md").exists()] == stages[-1:]  # the model card
    assert stages[-1] in (run / stages[-1] / "README.md").read_text()
    assert not leftovers(folder / "runs")
    for task in domain.EXPERT_TASKS:
        assert len(episode_ids(data / task)) >= demos, task
    frames = {data: 0, run / "D_rl": 0}
    for root in frames:
        for path in [p for p in root.rglob("*") if p.is_file()]:
            handle, header = open_episode(path)
            assert header["success"] == "1" and handle.get_tensor("reward")[-1] == 1
            assert int(header["seed"]) % ONLINE_SEED == int(path.stem)
            frames[root] += len(handle.get_tensor("reward"))
    trained_on = {
        s: json.loads((run / s / "summary.json").read_text()).get("frames") for s in stages
    }
    assert trained_on["0-sft"] == frames[data]  # Eq. 2
    assert trained_on["1-sft"] == sum(
        frames.values()
    )  # Eq. 4; Meta-World's smoke loop has no success to add
    return run


def episodes(folder: Path) -> dict[Path, tuple]:
    """Return {path: (header, tensors' bytes)} of the episodes under a folder: a header on disk has no fixed order."""
    opened = {p.relative_to(folder): open_episode(p) for p in Path(folder).rglob("*.safetensors")}
    names = ("image", "action", "reward")
    return {
        p: (header, *(handle.get_tensor(n).tobytes() for n in names))
        for p, (handle, header) in opened.items()
    }


def episode_info(task: str = "red", **changes) -> EpisodeInfo:
    """Return the header of an episode of the bead."""
    about = {
        "domain": "bead",
        "task": task,
        "instruction": f"push the {task} bead",
        "source": "expert",
        "seed": 0,
    }
    return EpisodeInfo(**{**about, "protocol": {"horizon": 8}, **changes})


def write_d_e(
    root: Path, bead: ModuleType, episodes: int = 3, T: int = 5
) -> Callable[[], EpisodeDataset]:
    """Write episodes of noise for the bead's expert tasks. Return a function that opens them as a data set."""
    rng = np.random.default_rng(0)
    for task in bead.EXPERT_TASKS:
        for k in range(episodes):
            image = rng.integers(0, 256, (T, 32, 32, 3))
            action = rng.uniform(-1, 1, (T, 2))
            path = root / task / f"{k:06d}.safetensors"
            write_episode(path, image, action, np.eye(T)[-1], episode_info(task, seed=k))
    return lambda: EpisodeDataset({root / task: 1.0 for task in bead.EXPERT_TASKS}, bead, 32)


def pytest_collection_modifyitems(items):
    """Start the longest test first, so that the last process need not wait for it."""
    items.sort(key=lambda item: item.name != "test_smoke_loop_on_metaworld")


@pytest.fixture(autouse=True)
def seeded():
    """Random weights are the same in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def bead(project) -> ModuleType:
    """The bead's module, for this process."""
    spec = importlib.util.spec_from_file_location(
        "domains.bead", project.folder / "domains/bead.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(project) -> Path:
    """An untrained checkpoint of the bead, runs/start. A test copies it before it changes it."""
    torch.manual_seed(0)
    folder = project.folder / "runs/start"
    make_vla(folder).save(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    """A small BLIP-2 folder in HF's layout, such as a user passes as --vlm. LoRA adapts it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbone")
    build_tiny(folder, SENTENCES, image_size=32)
    return str(folder)


@pytest.fixture(scope="session")
def t5_backbone(backbone, tmp_path_factory) -> str:
    """The same BLIP-2 with a T5 as its language model, as in the Flan-T5 versions on the hub."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("t5")
    old = Blip2ForConditionalGeneration.from_pretrained(backbone)
    vla = make_vla(folder, backbone)
    text = T5Config(
        vocab_size=len(vla.tokenizer), d_model=48, d_kv=12, num_heads=4, d_ff=96, num_layers=2
    )
    config = Blip2Config(
        vision_config=old.config.vision_config.to_dict(),
        qformer_config=old.config.qformer_config.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=8,
        image_token_index=old.config.image_token_index,
    )
    new = Blip2ForConditionalGeneration(config)
    new.query_tokens.data.normal_()
    for part in (new, vla.tokenizer, vla.image_processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> tuple[Project, float]:
    """A project in which the bead's smoke loop has run once from beginning to end, and the seconds that this took.

    The first test process that needs it runs it. Each process has a copy.
    """
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    with folder_lock(shared):
        if not (shared / "seconds").exists():
            began = time.time()
            project.must("bash", "loop.sh", "bead", "1", SMOKE="1")
            shutil.copytree(project.folder / "runs", shared / "runs")
            (shared / "seconds").write_text(str(time.time() - began))
    shutil.copytree(shared / "runs", project.folder / "runs", dirs_exist_ok=True)
    return project, float((shared / "seconds").read_text())


@pytest.fixture(scope="module")
def url():
    """The address of a simulated robot server in lock-step, a process for each file of tests."""
    from robots import lockstep_process

    with lockstep_process() as url:
        yield url


@pytest.fixture
def robot_server(url, monkeypatch):
    """A client of that server, which the environment variables name too."""
    from robots import connected

    with connected(url, monkeypatch) as client:
        yield client
