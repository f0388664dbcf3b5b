"""A rendered decision of domains/metaworld.py beside stock Meta-World's, at the same size. python benchmarks/render.py

A decision is two steps of physics and one picture. Theirs is gym.make("Meta-World/MT1", render_mode="rgb_array"), two
step() and one render(), with the camera put where ours is. Each side has a process of its own (two MuJoCo renderers in
one process can corrupt each other); they take turns, so that only one works at a time. Medians over rounds of the mean
time a decision; writes results/benchmarks/render.json and render.png.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "egl")


def ours(task, size):
    from domains import metaworld

    env = metaworld.make(task, size)
    env.reset(seed=0)
    return env, lambda action: env.step(action)[0], lambda: env.picture(size)


def theirs(task, size):
    import gymnasium as gym
    import metaworld  # registers its environments with gymnasium
    import numpy as np

    from domains.metaworld import ACTION_REPEAT, CAMERA

    assert metaworld.__name__
    settings = {"render_mode": "rgb_array", "width": size, "height": size, "disable_env_checker": True}
    env = gym.make("Meta-World/MT1", env_name=f"{task}-v3", seed=0, **settings)
    env.unwrapped.mujoco_renderer.default_cam_config = CAMERA | {"lookat": np.array(CAMERA["lookat"])}
    env.reset()

    def step(action):
        for _ in range(ACTION_REPEAT):
            env.step(action)
        return env.render()

    return env, step, env.render


def serve(side, task, size, pipe):
    """Times as many decisions as the pipe asks for; at the end sends a picture of the first state instead."""
    import numpy as np

    env, step, draw = side(task, size)
    rng = np.random.default_rng(0)
    first = np.array(draw())
    step(np.zeros(4, np.float32))
    while decisions := pipe.recv():
        start = time.perf_counter()
        for _ in range(decisions):
            step(rng.uniform(-0.3, 0.3, 4).astype(np.float32))
        pipe.send((time.perf_counter() - start) / decisions)
        env.reset()
    pipe.send(first)
    env.close()


def compare(task, size, rounds):
    """Median seconds a decision and a picture, of ours and of theirs."""
    spawn, sides = multiprocessing.get_context("spawn"), []
    for side, decisions in ((ours, 40), (theirs, 5)):
        pipe, far_end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(side, task, size, far_end), daemon=True)
        process.start()
        far_end.close()
        sides.append((pipe, process, decisions, []))
    for _ in range(rounds):
        for pipe, _, decisions, seconds in sides:
            pipe.send(decisions)
            seconds.append(pipe.recv())
    medians, pictures = [], []
    for pipe, process, _, seconds in sides:
        pipe.send(0)
        pictures.append(pipe.recv())
        process.join()
        medians.append(sorted(seconds)[len(seconds) // 2])
    return medians, pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["drawer-open", "door-open"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out, rows = ROOT / "results" / "benchmarks", {}
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, len(args.tasks) * len(args.sizes), squeeze=False, figsize=(11, 6))
    for column, (task, size) in enumerate((task, size) for size in args.sizes for task in args.tasks):
        medians, pictures = compare(task, size, args.rounds)
        name = f"{task}, {size} px, ms a rendered decision"
        mine, stock = (1000 * median for median in medians)
        rows[name] = {"ours": round(mine, 2), "theirs": round(stock, 2), "ratio": round(stock / mine, 1)}
        print(f"{name}: {rows[name]}", flush=True)
        for axis, picture, label in zip(axes[:, column], pictures, ("ours", "stock"), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(f"{label}, {task}, {size} px", fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "render.png", dpi=100)
    (out / "render.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
