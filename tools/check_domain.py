"""
Check a domain: the success rate of its scripted experts, and the first image of every task.

Writes results/NAME/experts.md and results/NAME/contact_sheet.png.

    python -m tools.check_domain NAME
"""

from dataclasses import dataclass

from tyro.conf import Positional

from common.cli import parse


@dataclass
class Args:
    domain: Positional[str]  # name of a file in domains/
    episodes: int = 20  # episodes per task, with and without noise
    action_noise_std: float = 0.2  # std of the noise on all dimensions but the last
    seed: int = 20_000  # seed of each task's first episode
    out: str = ""  # folder for the two files (default: results/<domain>)


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import math
import time
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np

from common.cli import check_numbers
from common.errors import run_cli
from common.figures import pyplot
from common.files import atomic_write, check_output
from common.rates import splits
from domains import load_domain
from evaluate import only_simulated
from report import COLOURS, LABELS

REPLAYED = 10  # noisy episodes per task that are replayed


def run_expert(
    domain: ModuleType, env: gym.Env, seed: int, action_noise_std: float
) -> tuple[bool, list[np.ndarray], np.ndarray]:
    """Run one episode of the expert. Return (success, executed actions, first image)."""
    rng = np.random.default_rng(seed)
    first, _ = env.reset(seed=seed)
    actions = []
    terminated = truncated = False
    while not (terminated or truncated):
        action = domain.expert(env)
        action[:-1] += action_noise_std * rng.standard_normal(len(action) - 1, dtype=np.float32)
        actions.append(action)
        _, _, terminated, truncated, _ = env.step(action)
    return terminated, actions, first


def replay(env: gym.Env, seed: int, actions: list[np.ndarray]) -> bool:
    """Return whether the actions succeed again from the same seed, without looking at the images."""
    env.reset(seed=seed)
    return [env.step(action)[2] for action in actions][-1]


def check_task(args: Args, domain: ModuleType, task: str) -> tuple[list[str], np.ndarray]:
    """Return (a task's cells of experts.md, its first image)."""
    env = domain.make(task, 64)
    cells = []
    for std in (0.0, args.action_noise_std):
        solved = {}
        for seed in range(args.seed, args.seed + args.episodes):
            success, actions, image = run_expert(domain, env, seed, std)
            if seed == args.seed:
                first = image
            if success:
                solved[seed] = actions
        lengths = [len(actions) for actions in solved.values()]
        cells.append(f"{len(solved)}/{args.episodes}")
        cells.append(f"{np.mean(lengths):.0f} ({max(lengths)})" if lengths else "-")
    env.close()
    env = domain.make(task, 64)  # another one, so that nothing of the first one's state helps
    chosen = list(solved.items())[:REPLAYED]
    again = sum(replay(env, seed, actions) for seed, actions in chosen)
    env.close()
    return [*cells, f"{again}/{len(chosen)}"], first


def markdown(args: Args, domain: ModuleType, rows: list[list[str]]) -> str:
    """Return the text of experts.md."""
    std = f"{args.action_noise_std:g}"
    length = "steps, mean (max)"
    head = [
        "task",
        "split",
        "no noise",
        length,
        f"noise {std}",
        length,
        "noisy ones replayed",
        "instruction",
    ]
    command = (
        f"python -m tools.check_domain {args.domain} --episodes {args.episodes} "
        f"--action-noise-std {std} --seed {args.seed}"
    )
    lines = [
        f"# Scripted experts, {args.domain}",
        "",
        f"`{command}`",
        "",
        "Successful episodes, their environment steps, and how many of the noisy ones succeed again if their actions",
        "are replayed from the same seed without looking at the images.",
        "",
        f"Protocol: `{domain.PROTOCOL}`",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
        *[f"| {' | '.join(row)} |" for row in rows],
    ]
    return "\n".join(lines) + "\n"


def contact_sheet(domain: ModuleType, images: dict[str, np.ndarray], path: Path) -> None:
    """Write the first image of every task, grouped by split. A task's name and frame have its split's colour."""
    plt = pyplot()
    least = math.ceil(math.sqrt(2 * len(images)))
    columns = min(range(least, 2 * least), key=lambda n: -len(images) % n)  # the fewest empty cells
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 * columns, 1.62 * rows + 0.3), squeeze=False
    )
    tasks = [(task, split) for split, names in splits(domain).items() for task in names]
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    for ax, (task, split) in zip(axes.flat, tasks):
        ax.imshow(images[task], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(task, fontsize=6.5, pad=3, color=COLOURS[split])
        for spine in ax.spines.values():
            spine.set(color=COLOURS[split], linewidth=2)
    labels = [f"{len(names)} {LABELS[split]}" for split, names in splits(domain).items()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[split]) for split in splits(domain)]
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(pad=0.4, rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def main(args: Args) -> None:
    check_numbers(args, ("episodes",))
    domain = load_domain(args.domain)
    only_simulated(domain, "tools.check_domain")
    out = Path(args.out or f"results/{args.domain}")
    check_output(out / "experts.md")
    start = time.time()
    rows = []
    images = {}
    for split, tasks in splits(domain).items():
        for task in tasks:
            cells, images[task] = check_task(args, domain, task)
            rows.append([task, split, *cells, domain.INSTRUCTIONS[task]])
            print(f"{time.time() - start:5.0f} s  {' | '.join(rows[-1])}", flush=True)
    with atomic_write(out / "experts.md") as tmp:
        tmp.write_text(markdown(args, domain, rows))
    with atomic_write(out / "contact_sheet.png") as tmp:
        contact_sheet(domain, images, tmp)
    print(f"wrote {out / 'experts.md'} and {out / 'contact_sheet.png'}")


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
