"""Measure how the cost grows. Writes results/benchmarks/scaling.png and scaling.json.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rounds 1 --max-episodes 1000 --envs 1 2 --images 64 96          a quick try

    episodes       seconds to open a data set, and to draw a batch of 256 frames from it; 100 to 10,000 episodes
    tasks          the same with 10 episodes of each of 5 to 40 tasks
    environments   rendered environment steps a second of 1 to 16 environments, a process each, without a policy
    processes      samples a second of stage 0 in 1 and 2 processes that torchrun starts, a CPU thread each
    image          images a second through `VLA.encode` at 64 to 224 px (the tiny VLM: 16 to 196 patches)

The dashed line extrapolates the first point: in proportion to episodes, tasks, environments or
pixels, and level for a batch, whose size is fixed. Environments and processes cannot follow it
beyond the number of cores. All episodes of a task are links to one file, so this is the cost of the
code and not of the disk, which benchmarks/loading.py measures. The numbers are medians over rounds
in which every size has its turn.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from benchmarks._episodes import write_noise_episode
from benchmarks._turns import RESULTS, ROOT, samples_per_second, save_rows, take_turns
from common.figures import pyplot
from common.rates import all_tasks
from common.vector_env import make_vector_env
from data import EpisodeDataset
from domains import load_domain
from model import VLA, VLAConfig

IMAGE_SIZE = 64
STEPS = 16  # environment steps in a turn
BATCH = 256  # frames per optimizer step
INSTRUCTION = "open the drawer"


@dataclass
class Panel:
    """One curve of the figure."""

    title: str
    label: str  # label of the x axis
    unit: str
    values: dict[int, float]  # {size: measurement}
    exponent: float  # exponent of the dashed line: 1 for proportion, 0 for level, -2 for pixels

    def line(self) -> list[float]:
        """Return the dashed line's values."""
        first = next(iter(self.values))
        return [self.values[first] * (size / first) ** self.exponent for size in self.values]


def write_linked_episodes(folder: Path, task: str, episodes: int) -> None:
    """Write one episode of noise, and links to it under the other episodes' names. A data set only reads them."""
    first = folder / task / "000000.safetensors"
    write_noise_episode(first, task)
    for k in range(1, episodes):
        first.with_name(f"{k:06d}.safetensors").hardlink_to(first)


def measure_data_sets(folders: dict[int, list[Path]], rounds: int) -> tuple[dict, dict]:
    """Return ({size: seconds to open}, {size: seconds per batch}) for {size: folders of episodes}."""
    domain = load_domain("metaworld")
    open_set = {}
    for size, paths in folders.items():
        open_set[size] = partial(EpisodeDataset, dict.fromkeys(paths, 1.0), domain, IMAGE_SIZE)
    opened = take_turns(open_set, rounds)
    rng = np.random.default_rng(0)
    draw = {size: partial(make().batch, rng, 256) for size, make in open_set.items()}
    return opened, take_turns(draw, rounds)


def measure_environments(numbers: list[int], rounds: int) -> dict[int, float]:
    """Return {number of environments: environment steps a second}."""
    domain = load_domain("metaworld")
    make = partial(domain.make, "drawer-open", IMAGE_SIZE)
    fleets = {n: make_vector_env([make] * n, AutoresetMode.NEXT_STEP) for n in numbers}

    def turn(n: int) -> None:
        for actions in (
            np.random.default_rng(0).uniform(-0.3, 0.3, (STEPS, n, 4)).astype(np.float32)
        ):
            fleets[n].step(actions)

    for envs in fleets.values():
        envs.reset(seed=0)
    seconds = take_turns({n: partial(turn, n) for n in fleets}, rounds)
    for envs in fleets.values():
        envs.close(terminate=True)
    return {n: STEPS * n / s for n, s in seconds.items()}


def sft_speed(processes: int, data: Path, out: Path) -> float:
    """Return the samples/s of 100 steps of stage 0 on Meta-World, its batch divided among the processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    stage = ["stage0_sft.py", "--domain", "metaworld", "--data", data, "--out", out, "--demos", "1"]
    short = ["--steps", "150", "--batch", str(BATCH), "--threads", "1", "--episodes", "0"]
    subprocess.run([sys.executable, *launcher, *stage, *short], cwd=ROOT, check=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return samples_per_second(log, BATCH)


def measure_processes(numbers: list[int], rounds: int, folder: Path) -> dict[int, float]:
    """Return {number of processes: samples/s}, medians over turns."""
    for task in load_domain("metaworld").EXPERT_TASKS:
        write_linked_episodes(folder / "D_e/metaworld", task, 1)
    speed = {n: [] for n in numbers}
    for k in range(rounds):
        for n in numbers:
            speed[n].append(sft_speed(n, folder / "D_e", folder / f"{n}-{k}"))
    return {n: float(np.median(values)) for n, values in speed.items()}


def make_encoder(size: int, batch: int, folder: str) -> Callable:
    """Return a function that encodes `batch` images of `size` pixels with a tiny VLM."""
    config = VLAConfig(
        vlm="tiny", domain="metaworld", action_dim=4, image_size=size, dtype="bfloat16"
    )
    vla = VLA.create(config, [INSTRUCTION], Path(folder) / str(size))
    images = np.zeros((batch, size, size, 3), np.uint8)

    @torch.no_grad()
    def encode() -> None:
        vla.encode(images, [INSTRUCTION] * batch)

    return encode


def measure(args: argparse.Namespace, folder: str) -> list[Panel]:
    """Return the figure's panels. folder: for temporary files."""
    panels = []
    by_episodes = {}
    for n in (100, 300, 1000, 3000, 10_000):
        if n <= args.max_episodes:
            write_linked_episodes(Path(folder) / str(n), "drawer-open", n)
            by_episodes[n] = [Path(folder) / str(n) / "drawer-open"]
    opened, drawn = measure_data_sets(by_episodes, args.rounds)
    panels.append(Panel("open a data set", "episodes", "s", opened, 1))
    panels.append(Panel("draw a batch of 256", "episodes", "s", drawn, 0))

    tasks = all_tasks(load_domain("metaworld"))
    for task in tasks:
        write_linked_episodes(Path(folder) / "tasks", task, 10)
    by_tasks = {n: [Path(folder) / "tasks" / task for task in tasks[:n]] for n in args.tasks}
    opened, drawn = measure_data_sets(by_tasks, args.rounds)
    panels.append(Panel("open, 10 episodes a task", "tasks", "s", opened, 1))
    panels.append(Panel("draw a batch of 256", "tasks", "s", drawn, 0))

    speed = measure_environments(args.envs, args.rounds)
    panels.append(Panel("rendered environment steps", "environments", "1/s", speed, 1))

    speed = measure_processes(args.processes, args.rounds, Path(folder) / "processes")
    panels.append(Panel("SFT", "processes", "samples/s", speed, 1))

    encoders = {size: make_encoder(size, args.batch, folder) for size in args.images}
    seconds = take_turns(encoders, args.rounds)
    speed = {size: args.batch / s for size, s in seconds.items()}
    panels.append(Panel("images encoded, tiny VLM", "px", "1/s", speed, -2))
    return panels


def draw(panels: list[Panel]) -> None:
    """Write scaling.png."""
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3), layout="constrained"
    )
    for axis, panel in zip(axes, panels):
        x = list(panel.values)
        y = list(panel.values.values())
        line = panel.line()
        axis.plot(x, line, "--", color="0.6", label="straight line")
        axis.plot(x, y, "o-", color="#d1603d", label="measured")
        axis.set_xscale("log")
        axis.set_yscale("log")
        # So that a few percent do not look like a slope.
        axis.set_ylim(min(y + line) / 3, max(y + line) * 3)
        axis.set_xticks(x, x, fontsize=8)
        ends = [y[0], y[-1]]
        axis.set_yticks(ends, [f"{float(f'{v:.2g}'):g}" for v in ends], fontsize=8)
        axis.minorticks_off()
        axis.set(xlabel=panel.label, ylabel=panel.unit)
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "scaling.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--max-episodes", type=int, default=10_000, help="size of the largest data set"
    )
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[5, 10, 20, 40], help="numbers of tasks"
    )
    parser.add_argument(
        "--envs", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="numbers of environments"
    )
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2], help="numbers of SFT processes"
    )
    parser.add_argument(
        "--images", nargs="+", type=int, default=[64, 96, 128, 160, 192, 224], help="image sizes"
    )
    parser.add_argument("--batch", type=int, default=16, help="images encoded together")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each size")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        panels = measure(args, folder)
    draw(panels)
    for panel in panels:
        values = {str(n): float(f"{v:.3g}") for n, v in panel.values.items()}
        save_rows("scaling", {f"{panel.title}, {panel.unit}, by {panel.label}": values})


if __name__ == "__main__":
    main()
