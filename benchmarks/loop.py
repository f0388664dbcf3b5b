"""Compare loop.sh and its parts with another checkout of this project, in turns on one machine.

    git worktree add ../before c944600
    python -m benchmarks.loop --beside ../before
    python -m benchmarks.loop --beside ../before --only metaworld kitchen        the whole loops: hours

Each checkout runs its own commands, with this Python. The rows of results/benchmarks/loop.json:

    metaworld, kitchen    wall time of `bash loop.sh metaworld 5` and `bash loop.sh kitchen 2`, minutes
    sft                   SFT as loop.sh starts it, samples/s
    render-metaworld, ... one environment in one process: environment steps/s, over all of the domain's tasks
    evaluation            wall time of evaluate.py on all 40 tasks, seconds
    d_e                   wall time of recording expert episodes of all 25 tasks, seconds
    start                 `python stage_rl.py ...` from Enter to the first environment steps, seconds

A ratio above 1 means that this checkout is faster. The policy of `evaluation` is untrained, so each
episode lasts until the horizon.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks._turns import ROOT, row, samples_per_second, save_rows

RENDER = """
import importlib, sys, time
import numpy as np
from domains import load_domain
domain = load_domain(sys.argv[1])
tasks = [*domain.EXPERT_TASKS, *domain.RL_TASKS, *domain.UNSEEN_TASKS]
rng = np.random.default_rng(0)
seconds = steps = 0
for task in tasks:
    env = domain.make(task, 64)
    env.reset(seed=0)
    actions = rng.uniform(-0.3, 0.3, (22, *env.action_space.shape)).astype(np.float32)
    for i, action in enumerate(actions):
        if i == 2:
            began = time.perf_counter()
        env.step(action)
    seconds += time.perf_counter() - began
    steps += 20
    env.close()
print(steps / seconds)
"""
UNTRAINED = ["--steps", "1", "--episodes", "0"]


class Checkout:
    """One checkout of the project, and a temporary folder of its own episodes and checkpoints."""

    def __init__(self, root: Path, scratch: Path):
        self.root = root
        self.scratch = scratch
        self.data = scratch / "D_e"
        self.start = scratch / "untrained"

    def popen(self, *command: object) -> subprocess.Popen:
        """Start a command in the checkout, in a process group of its own."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHON": sys.executable}
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.root,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object) -> str:
        """Run a command to its end and return what it prints. Raises RuntimeError if it fails."""
        process = self.popen(*command)
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{command} in {self.root} failed: {err[-2000:]}")
        return out

    def fresh(self, name: str) -> Path:
        """Return a path in the scratch folder at which nothing is."""
        for path in self.scratch.glob(f"*{name}*"):
            shutil.rmtree(path)
        return self.scratch / name

    def record(self, demos: int, data: Path) -> None:
        """Record D_e of Meta-World, and train one step on it."""
        stage = [sys.executable, "stage0_sft.py", "--domain", "metaworld", "--demos", demos]
        out = self.fresh("recorded")
        self.run(*stage, "--data", data, "--out", out, *UNTRAINED)
        if not self.start.exists():
            shutil.copytree(out, self.start)


def log_lines(folder: Path, out: str) -> list[dict]:
    """Return the log of a stage that is being trained."""
    paths = list(folder.glob(f".{out}*/log.jsonl"))
    return [json.loads(line) for line in paths[0].read_text().splitlines()] if paths else []


def first_lines(side: Checkout, command: list, out: str, n: int) -> Iterator[dict]:
    """Run a stage until its log has n lines, yield them, and end it."""
    process = side.popen(*command)
    try:
        while len(lines := log_lines(side.scratch, out)) < n:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended: {process.stderr.read()[-2000:]}")
            time.sleep(0.02)
        yield from lines
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def start(side: Checkout) -> float:
    """Return the seconds from the start of stage 1 to the end of a rollout of four steps and an update."""
    out = side.fresh("1-rl")
    stage = [sys.executable, "stage_rl.py", "--task", "button-press-new", "--parent", side.start]
    began = time.perf_counter()
    list(first_lines(side, [*stage, "--out", out, "--rollout", 4, "--episodes", 0], out.name, 1))
    return time.perf_counter() - began


def sft(side: Checkout) -> float:
    """Return the samples/s of stage 0 with its default batch and threads, over 100 steps."""
    out = side.fresh("timed-sft")
    stage = [
        sys.executable,
        "stage0_sft.py",
        "--domain",
        "metaworld",
        "--demos",
        1,
        "--data",
        side.data,
    ]
    lines = list(first_lines(side, [*stage, "--out", out, "--episodes", 0], out.name, 3))
    return samples_per_second(lines, 256)


def d_e(side: Checkout, demos: int) -> float:
    """Return the seconds between the first recorded episode of expert data and the last one."""
    data = side.fresh("timed-D_e")
    side.record(demos, data)
    times = [path.stat().st_mtime for path in data.rglob("*.safetensors")]
    return max(times) - min(times)


def evaluation(side: Checkout, episodes: int) -> float:
    """Return the seconds of evaluate.py, its start included."""
    began = time.perf_counter()
    side.run(sys.executable, "evaluate.py", "--checkpoint", side.start, "--episodes", episodes)
    return time.perf_counter() - began


def render(side: Checkout, domain: str) -> float:
    """Return the environment steps/s of one environment in this process, its images included."""
    return float(side.run(sys.executable, "-c", RENDER, domain))


def loop(side: Checkout, domain: str, rounds: int) -> float:
    """Return the minutes of loop.sh with all its defaults, in the checkout's own runs/."""
    for path in ("D_e", f"{domain}-seed0"):
        shutil.rmtree(side.root / "runs" / path, ignore_errors=True)
    began = time.perf_counter()
    side.run("bash", "loop.sh", domain, rounds)
    return (time.perf_counter() - began) / 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, required=True, help="the other checkout")
    parser.add_argument("--only", nargs="+", help="rows to measure (default: all but the loops)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--demos", type=int, default=4, help="episodes of each task, for d_e")
    parser.add_argument("--episodes", type=int, default=5, help="of each task, for evaluation")
    args = parser.parse_args()
    # {row: (function, whether more is better, turns)}
    measured: dict[str, tuple[Callable, bool, int]] = {
        "start": (start, False, args.rounds),
        "sft": (sft, True, args.rounds),
        "render-metaworld": (lambda side: render(side, "metaworld"), True, args.rounds),
        "render-kitchen": (lambda side: render(side, "kitchen"), True, args.rounds),
        "d_e": (lambda side: d_e(side, args.demos), False, 1),
        "evaluation": (lambda side: evaluation(side, args.episodes), False, 1),
        "metaworld": (lambda side: loop(side, "metaworld", 5), False, 1),
        "kitchen": (lambda side: loop(side, "kitchen", 2), False, 1),
    }
    names = args.only or [name for name in measured if name not in ("metaworld", "kitchen")]
    with tempfile.TemporaryDirectory() as scratch:
        sides = [
            Checkout(ROOT, Path(scratch, "ours")),
            Checkout(args.beside.resolve(), Path(scratch, "theirs")),
        ]
        if set(names) & {"start", "sft", "evaluation"}:
            for side in sides:
                side.record(1, side.data)
        for name in names:
            function, more, rounds = measured[name]
            each = [[function(side) for side in sides] for _ in range(rounds)]
            ours, theirs = np.median(each, axis=0)
            save_rows("loop", {name: row(ours, theirs, ours / theirs if more else theirs / ours)})


if __name__ == "__main__":
    main()
