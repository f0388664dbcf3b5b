"""Checks a domain: the experts' success in every task, and what the policy sees first.

    python -m domains._check metaworld

Writes results/<domain>/experts.md and results/<domain>/contact_sheet.png.
"""

import argparse
import importlib
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def trial(domain, env, seed, noise):
    """One episode of the expert, Gaussian `noise` (std) on all but the gripper: (success, executed actions)."""
    rng, actions = np.random.default_rng(seed), []
    env.reset(seed=seed)
    terminated = truncated = False
    while not (terminated or truncated):
        action = domain.expert(env)
        action[:-1] += noise * rng.standard_normal(len(action) - 1, dtype=np.float32)
        actions.append(action)
        _, _, terminated, truncated, _ = env.step(action)
    return terminated, actions


def replayed(domain, task, episodes):
    """How many of [(seed, actions), ...] succeed again, open loop, in an environment of their own."""
    env = domain.make(task)
    again = 0
    for seed, actions in episodes:
        env.reset(seed=seed)
        again += [env.step(action)[2] for action in actions][-1]
    env.close()
    return again


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain")
    parser.add_argument("--episodes", type=int, default=20, help="episodes a task, clean and noisy each")
    parser.add_argument("--noise", type=float, default=0.2, help="standard deviation of the noise on its motion")
    parser.add_argument("--seed", type=int, default=20_000, help="seed of each task's first episode")
    args = parser.parse_args()
    domain = importlib.import_module(f"domains.{args.domain}")
    out = Path("results", args.domain)
    out.mkdir(parents=True, exist_ok=True)

    splits = {"expert": domain.EXPERT_TASKS, "rl": domain.RL_TASKS, "unseen": domain.UNSEEN_TASKS}
    rows, frames, start = [], [], time.time()
    for split, tasks in splits.items():
        for task in tasks:
            env = domain.make(task)
            frames.append((task, env.reset(seed=args.seed)[0]))
            cells = []
            for noise in (0.0, args.noise):
                trials = [trial(domain, env, args.seed + i, noise) for i in range(args.episodes)]
                lengths = [len(actions) for success, actions in trials if success]
                spread = f"{np.mean(lengths):.0f} ({max(lengths)})" if lengths else "-"
                cells += [f"{len(lengths)}/{args.episodes}", spread]
            env.close()
            noisy = [(args.seed + i, actions) for i, (success, actions) in enumerate(trials) if success][:10]
            cells.append(f"{replayed(domain, task, noisy)}/{len(noisy)}")
            rows.append(f"| {task} | {split} | {' | '.join(cells)} | {domain.INSTRUCTIONS[task]} |")
            print(f"{time.time() - start:5.0f} s  {rows[-1]}", flush=True)

    command = (
        f"python -m domains._check {args.domain} --episodes {args.episodes} --noise {args.noise} --seed {args.seed}"
    )
    took = "decisions, mean (max)"
    head = ["task", "split", "clean", took, f"noise {args.noise:g}", took, "noisy ones replayed", "instruction"]
    lines = [f"# Scripted experts, {args.domain}", "", f"`{command}`", ""]
    lines += [
        "Successful episodes, how many decisions those took, and how many of the noisy ones succeed again when their"
    ]
    lines += [f"actions are replayed from the same seed without looking. Protocol: `{domain.PROTOCOL}`", ""]
    lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows, ""]
    (out / "experts.md").write_text("\n".join(lines))

    columns = 8
    figure, axes = plt.subplots(
        -(-len(frames) // columns), columns, figsize=(columns * 1.7, -(-len(frames) // columns) * 1.9)
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (task, frame) in zip(axes.flat, frames, strict=False):
        axis.imshow(frame, interpolation="nearest")
        axis.set_title(task, fontsize=7.5, pad=2)
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "contact_sheet.png", dpi=130)


if __name__ == "__main__":
    main()
