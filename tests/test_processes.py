"""Helper processes that die or cannot start, and settings that a launcher or a shell leaves behind."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import gymnasium as gym
import numpy as np
import psutil
import pytest
from conftest import (
    BEAD,
    ROOT,
    Project,
    command,
    kill,
    make_vla,
    one_sentence,
    refused,
    warm_python,
)
from gymnasium.vector import AutoresetMode

from common.distributed import rank_and_world_size, require_one_process
from common.episode_file import episode_ids
from common.errors import UserError
from common.vector_env import make_vector_env

# The bead, whose process is killed in `make`, `reset`, `step` or `expert` if a file says so: once.
FRAGILE = (
    BEAD.replace('NAME = "bead"', 'NAME = "fragile"')
    + """

import os
import signal
import sys


def kill_once(place):
    if "torch" in sys.modules:  # not a worker: a vector environment makes one environment in its own process
        return
    try:
        os.unlink(f"kill-{place}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Fragile(Bead):
    def __init__(self, task, image_size):
        kill_once("make")
        super().__init__(task, image_size)

    def reset(self, **more):
        kill_once("reset")
        return super().reset(**more)

    def step(self, action):
        if self.t == 2:
            kill_once("step")
        return super().step(action)


def make(task, image_size=64):
    return Fragile(task, image_size)


sound_expert = expert


def expert(env):
    if env.unwrapped.t == 2:
        kill_once("expert")
    return sound_expert(env)
"""
)
# The bead, in a file that a process without torch, hence a worker, cannot import.
UNIMPORTABLE = (
    BEAD.replace('NAME = "bead"', 'NAME = "unimportable"')
    + """

import os
import sys

if "torch" not in sys.modules:
    HOW
"""
)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """A project with the domain `fragile` and a checkpoint of it, runs/start."""
    project = Project(tmp_path_factory.mktemp("fragile"))
    (project.folder / "domains/fragile.py").write_text(FRAGILE)
    start = project.folder / "runs/start"
    make_vla(start, domain="fragile").save(start)
    return project


def dies(project, words, place):
    """Run a command whose worker is killed. Return its one sentence, within seconds of the kill."""
    (project.folder / f"kill-{place}").touch()
    sentence = one_sentence(project.run(*words, timeout=120))
    assert not (project.folder / f"kill-{place}").exists()
    assert "was killed" in sentence and "memory" in sentence
    return sentence


@pytest.mark.parametrize("place", ["make", "reset", "step"])
def test_a_killed_environment_ends_the_command_with_one_sentence(fragile, place):
    """Of evaluate.py and of stage 1 by PPO and SACfD. Without the kill the same command then runs to its end."""
    small = {
        "parent": "runs/start",
        "task": "blue",
        "envs": 2,
        "rollout": 16,
        "successes": 1,
        "episodes": 0,
    }
    small |= {"env_steps": 64, "threads": 1}
    commands = [
        command("evaluate.py", checkpoint="runs/start", episodes=2, envs=2, tasks="blue"),
        command("stage_rl.py", out=f"runs/{place}/1-ppo", algo="ppo", **small),
        command(
            "stage_rl.py",
            "--sacfd.num-demos",
            0,
            out=f"runs/{place}/1-sacfd",
            algo="sacfd",
            **small,
        ),
    ]
    for words in commands:
        assert "--envs" in dies(fragile, words, place)
    fragile.must(*commands[1])


def test_workers_of_a_module_do_not_import_it(fragile):
    """Started by `python -m` too, workers are without torch: one that had it would not be killed here."""
    words = ["python", "-m", "tools.publish", "--checkpoint", "runs/start", "--out", "published"]
    dies(fragile, [*words, "--episodes", 1], "step")


def test_a_killed_recorder_ends_stage_0_with_one_sentence(fragile):
    """The same command then records the missing episodes and trains."""
    small = {"demos": 20, "steps": 1, "batch": 8, "episodes": 0, "threads": 2}
    stage0 = command(
        "stage0_sft.py", domain="fragile", data="D_e", out="runs/recorded/0-sft", **small
    )
    assert "--threads" in dies(fragile, stage0, "expert")
    assert len(episode_ids(fragile.folder / "D_e/fragile/red")) < 20
    fragile.must(*stage0)
    assert len(episode_ids(fragile.folder / "D_e/fragile/green")) >= 20


def test_recorders_end_with_a_killed_stage(project):
    """Their number is 0 soon after `kill -9` of stage 0 alone, as the kernel does when memory ends."""
    small = {"demos": 100_000, "steps": 1, "batch": 8, "episodes": 0, "threads": 2}
    words = command("stage0_sft.py", domain="bead", data="D_e-orphans", out="runs/orphans", **small)
    process = project.start(*words)
    workers = []
    while not list(project.folder.glob("D_e-orphans/bead/red/*.safetensors")):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)  # a worker would keep the streams open
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) >= 2 and not alive


@pytest.mark.parametrize("call", ["reset", "step", "step_wait", "close"])
def test_a_killed_environment_is_noticed_at_every_call(call, capfd):
    """UserError from reset and step. Closing is quiet, now and when the object is freed."""
    envs = make_vector_env([partial(gym.make, "CartPole-v1")] * 2, AutoresetMode.NEXT_STEP)
    actions = np.zeros(2, np.int64)
    envs.reset(seed=[1, 2])
    if call == "step_wait":
        os.kill(envs.processes[1].pid, signal.SIGSTOP)  # it must not answer before it is killed
        envs.step_async(actions)
    envs.processes[1].kill()
    envs.processes[1].join()
    if call == "close":
        envs.close()
    else:
        with pytest.raises(UserError, match="was killed"):
            envs.step_wait() if call == "step_wait" else envs.reset() if call == "reset" else envs.step(
                actions
            )
    envs.close()
    processes = list(envs.processes)
    del envs
    gc.collect()
    assert not any(process.is_alive() for process in processes)
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "Exception" not in err, err


@pytest.mark.parametrize("how", ['raise ImportError("not here")', "os._exit(3)"])
def test_workers_that_cannot_start_end_the_command(how, project):
    """A domain that only the workers cannot import: stage 0 and evaluate.py end, and do not start workers forever."""
    (project.folder / "domains/unimportable.py").write_text(UNIMPORTABLE.replace("HOW", how))
    start = project.folder / "runs/unimportable"
    if not start.exists():
        make_vla(start, domain="unimportable").save(start)
    data = project.folder / "runs/D_e-unimportable"
    small = {"demos": 2, "steps": 1, "batch": 8, "episodes": 0, "threads": 2}
    for words in (
        command(
            "stage0_sft.py",
            domain="unimportable",
            data=data,
            out="runs/unimportable-0/0-sft",
            **small,
        ),
        command("evaluate.py", checkpoint=start, episodes=2, envs=2),
    ):
        code, out, err = project.run(*words, timeout=120)
        assert code not in (0, None)
        assert len(err) < 20_000 and "error: " in err.splitlines()[-1], err


def test_started_from_a_folder_with_files_of_the_same_names(project, checkpoint, tmp_path):
    """A user's own evaluate.py, domains/ and numpy.py in the current folder are neither run nor imported."""
    for name in (
        "evaluate",
        "stage0_sft",
        "numpy",
        "gymnasium",
        "common/__init__",
        "domains/__init__",
        "domains/bead",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(
            f"open('touched', 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    small = {"demos": 1, "steps": 1, "batch": 8, "episodes": 1, "threads": 2}
    stage0 = command(
        project.folder / "stage0_sft.py", domain="bead", data="D_e", out="runs/0-sft", **small
    )
    project.must(*stage0, cwd=tmp_path)
    evaluation = command(
        project.folder / "evaluate.py", checkpoint="runs/0-sft", episodes=1, envs=2
    )
    project.must(*evaluation, cwd=tmp_path)
    assert (tmp_path / "runs/0-sft/eval.json").exists() and not (tmp_path / "touched").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Settings

STOP_AT_TORCH = """
import os, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
__import__(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module", ["stage0_sft", "stage_rl", "stage_sft", "evaluate", "model", "data", "tools.plan"]
)
def test_threads_sleep_while_they_wait(module):
    """OMP_WAIT_POLICY is set before torch is first imported, in a script and in an import. A user's own stays."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for more, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        words = [sys.executable, "-c", STOP_AT_TORCH, module]
        done = subprocess.run(words, cwd=ROOT, env=env | more, capture_output=True, text=True)
        assert done.stdout.strip() == policy, done.stderr


def test_a_world_size_left_by_another_job(project, checkpoint, tmp_path, monkeypatch):
    """WORLD_SIZE without the rest of a launcher's variables: one sentence. Empty or 1 is one process."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for value in ("", " ", "1"):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert rank_and_world_size() == (0, 1)
    for value in ("4", "many"):
        monkeypatch.setenv("WORLD_SIZE", value)
        sentence = refused(rank_and_world_size)
        assert (
            f"WORLD_SIZE={value}" in sentence and "unset" in sentence and "MASTER_ADDR" in sentence
        )
    for name, value in {**launcher(0, 2), "RANK": "first"}.items():
        monkeypatch.setenv(name, value)
    assert "RANK is missing or not valid" in refused(rank_and_world_size)
    for name in launcher(0, 2):
        monkeypatch.delenv(name)
    small = {"steps": 1, "batch": 8, "episodes": 0, "threads": 1}
    words = command(
        "stage_sft.py", parent=checkpoint, out=tmp_path / "1-sft", data=tmp_path, **small
    )
    assert "WORLD_SIZE=4" in one_sentence(project.run(*words, WORLD_SIZE="4"))
    evaluation = command("evaluate.py", checkpoint=checkpoint, episodes=1, envs=1, tasks="blue")
    project.must(*evaluation, WORLD_SIZE="4")  # it never runs as several processes


def launcher(rank, world):
    """Return the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in variables.items()}


def test_stage_1_is_one_process(project, checkpoint, tmp_path, monkeypatch):
    """Started by torchrun, it ends at once with one sentence, and does not wait for the others."""
    words = command("stage_rl.py", task="blue", parent=checkpoint, out=tmp_path / "1-rl")
    for algo in ("ppo", "sacfd"):
        sentence = one_sentence(project.run(*words, "--algo", algo, timeout=60, **launcher(0, 2)))
        assert "one process" in sentence and "WORLD_SIZE=2" in sentence
    for name, value in launcher(0, 1).items():
        monkeypatch.setenv(name, value)
    require_one_process("stage_rl.py")


def test_waiting_for_other_processes_is_reported(project, checkpoint, tmp_path):
    """One of two processes that torchrun would start prints whom it waits for, and goes on waiting."""
    words = command(
        "stage_sft.py", parent=checkpoint, out=tmp_path / "1-sft", data=tmp_path, episodes=0
    )
    process = project.start(*words, python=warm_python(), **launcher(0, 2))
    began = time.time()
    line = process.stdout.readline()
    assert re.search(r"rank 0: waiting for 1 other process", line) and time.time() - began < 60
    assert process.poll() is None
    kill(process, signal.SIGKILL).communicate()
