"""What the work costs as it grows: results/benchmarks/scaling.png and scaling.json.

    episodes       seconds to open a data set, and to draw a batch of 256 frames from it; 100 to 10,000 episodes
    tasks          the same with 10 episodes of each of 5 to 40 tasks
    environments   rendered decisions a second of 1 to 16 simulators, a process each, without a policy
    image          images a second through `VLA.encode` at 64 to 224 px (the tiny VLM: 16 to 196 patches)

The dashed line is the straight one through the first point: in proportion to episodes, tasks, simulators, or pixels;
level for a batch, which is as large in any set. Simulators cannot follow it beyond the number of cores. Episodes are
names of one file: this is the code's cost and not the disk's, which benchmarks/loading.py has. Medians over rounds, in
each of which every size has its turn.

python benchmarks/scaling.py
python benchmarks/scaling.py --rounds 2 --most 1000 --envs 1 2 --images 64 96          a try
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402

from benchmarks._turns import RESULTS, in_turns, keep  # noqa: E402
from data import Episodes, write_episode  # noqa: E402
from domains import load_domain, simulator  # noqa: E402
from domains import metaworld as domain  # noqa: E402
from evaluate import all_tasks, processes  # noqa: E402
from model import VLA  # noqa: E402

T, SIZE, SENTENCE = 40, 64, "open the drawer"


def record(folder, task, episodes):
    """Episodes of noise; one file, with as many names (hard links: a data set only ever reads them)."""
    first, rng = folder / task / "000000.safetensors", np.random.default_rng(0)
    write_episode(
        first, rng.integers(0, 256, (T, SIZE, SIZE, 3)), rng.uniform(-1, 1, (T, 4)), np.zeros(T), domain="metaworld",
        task=task, instruction=domain.INSTRUCTIONS[task], source="expert", seed=0, protocol=domain.PROTOCOL,
    )  # fmt: skip
    for k in range(1, episodes):
        first.with_name(f"{k:06d}.safetensors").hardlink_to(first)


def data_sets(folders, rounds):
    """({size: seconds to open}, {size: seconds a batch}) of {size: folders of episodes}."""
    opened = in_turns(
        {n: lambda f=f: Episodes(dict.fromkeys(f, 1.0), domain, SIZE) for n, f in folders.items()}, rounds
    )
    sets, rng = {n: Episodes(dict.fromkeys(f, 1.0), domain, SIZE) for n, f in folders.items()}, np.random.default_rng(0)
    return opened, in_turns({n: lambda d=d: d.batch(rng, 256) for n, d in sets.items()}, rounds)


def simulators(n):
    """A function that makes n simulators do some decisions each, and one that ends them."""
    load_domain("metaworld")  # tells the processes' server what to import
    make = partial(simulator, "metaworld", "drawer-open", SIZE)
    envs = processes([make] * n, AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (16, n, 4)).astype(np.float32)
    return lambda: [envs.step(a) for a in actions], envs


def encoder(size, batch, folder):
    vla = VLA.create("tiny", [SENTENCE], 4, "metaworld", size, 32, "all", "bfloat16", Path(folder) / str(size))
    images = np.zeros((batch, size, size, 3), np.uint8)

    @torch.no_grad()
    def encode():
        vla.encode(images, [SENTENCE] * batch)

    return encode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10_000, help="episodes")
    parser.add_argument("--tasks", nargs="+", type=int, default=[5, 10, 20, 40])
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 96, 128, 160, 192, 224])
    parser.add_argument("--batch", type=int, default=16, help="images encoded together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    panels = []  # (title, x label, unit, {size: value}, the straight line's value at a size)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        sizes = [n for n in (100, 300, 1000, 3000, 10_000) if n <= args.most]
        for n in sizes:
            record(Path(folder) / str(n), "drawer-open", n)
        opened, drawn = data_sets({n: [Path(folder) / str(n) / "drawer-open"] for n in sizes}, args.rounds)
        panels += [("open a data set", "episodes", "s", opened), ("draw a batch of 256", "episodes", "s", drawn)]
        for task in (tasks := all_tasks(domain)):
            record(Path(folder) / "tasks", task, 10)
        by_tasks = {n: [Path(folder) / "tasks" / task for task in tasks[:n]] for n in args.tasks}
        opened, drawn = data_sets(by_tasks, args.rounds)
        panels += [("open, 10 episodes a task", "tasks", "s", opened), ("draw a batch of 256", "tasks", "s", drawn)]
        made = {n: simulators(n) for n in args.envs}
        spent = in_turns({n: work for n, (work, _) in made.items()}, args.rounds)
        for _, envs in made.values():
            envs.close(terminate=True)
        panels += [("rendered decisions", "environments", "1/s", {n: 16 * n / s for n, s in spent.items()})]
        spent = in_turns({size: encoder(size, args.batch, folder) for size in args.images}, args.rounds)
        panels += [("images encoded, tiny VLM", "px", "1/s", {n: args.batch / s for n, s in spent.items()})]

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    straight = {  # in proportion to the first point's
        "episodes": lambda n: n, "tasks": lambda n: n, "environments": lambda n: n, "px": lambda n: n**-2.0
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3), layout="constrained")
    for axis, (title, label, unit, values) in zip(axes, panels):
        x, y = list(values), list(values.values())
        flat = title.startswith("draw")  # a batch is a batch: here the straight line is level
        line = [y[0] * (1 if flat else straight[label](n) / straight[label](x[0])) for n in x]
        axis.plot(x, line, "--", color="0.6", label="straight line")
        axis.plot(x, y, "o-", color="#d1603d", label="measured")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(min(y + line) / 3, max(y + line) * 3)  # a few percent up and down shall not look like a slope
        axis.set_xticks(x, x, fontsize=8)
        axis.set_yticks([y[0], y[-1]], [f"{float(f'{v:.2g}'):g}" for v in (y[0], y[-1])], fontsize=8)
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel=unit)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "scaling.png", dpi=100)
    for title, label, unit, values in panels:
        keep("scaling", {f"{title}, {unit}, by {label}": {str(n): float(f"{v:.3g}") for n, v in values.items()}})


if __name__ == "__main__":
    main()
