"""A rendered decision of our domains beside the stock environment's, at the same size. python benchmarks/render.py

A decision is some steps of physics and one picture; in the kitchen that is two views of half the size, and theirs are
two as well, whole ones, for a stock picture takes as long at any size. Theirs is gym.make("Meta-World/MT1" or
"FrankaKitchen-v1", render_mode="rgb_array"), as many step() and render(), with the camera put where ours is. Each side
has a process of its own (two MuJoCo renderers in one process can corrupt each other); they take turns, so that only one
works at a time. Medians over rounds of the mean time a decision; writes results/benchmarks/render.json and render.png.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "egl")


def ours(domain, task, size):
    env = importlib.import_module(f"domains.{domain}").make(task, size)
    env.reset(seed=0)
    return env, lambda action: env.step(action)[0], lambda: env.picture(size)


def stock_metaworld(task, view, settings):
    import gymnasium as gym

    env = gym.make("Meta-World/MT1", env_name=f"{task}-v3", seed=0, **settings)
    env.unwrapped.mujoco_renderer.default_cam_config = view
    return env


def stock_kitchen(task, view, settings):
    import gymnasium as gym
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make("FrankaKitchen-v1", tasks_to_complete=["slide cabinet"], default_camera_config=view, **settings)


STOCK = {"metaworld": stock_metaworld, "kitchen": stock_kitchen}


def theirs(domain, task, size):
    import numpy as np

    module = importlib.import_module(f"domains.{domain}")  # it also registers Meta-World's environments
    view = module.CAMERA | {"lookat": np.array(module.CAMERA["lookat"])}
    settings = {"render_mode": "rgb_array", "width": size, "height": size, "disable_env_checker": True}
    env = STOCK[domain](task, view, settings)
    env.reset(seed=0)

    def step(action):
        for _ in range(module.ACTION_REPEAT):
            env.step(action)
        return [env.render() for _ in range(module.VIEWS)][0]

    return env, step, env.render


def serve(side, domain, task, size, pipe):
    """Times as many decisions as the pipe asks for; at the end sends a picture of the first state instead."""
    import numpy as np

    env, step, draw = side(domain, task, size)
    rng = np.random.default_rng(0)
    first = np.array(draw())
    step(np.zeros(env.action_space.shape, np.float32))
    while decisions := pipe.recv():
        start = time.perf_counter()
        for _ in range(decisions):
            step(rng.uniform(-0.3, 0.3, env.action_space.shape).astype(np.float32))
        pipe.send((time.perf_counter() - start) / decisions)
        env.reset()
    pipe.send(first)
    env.close()


def compare(domain, task, size, rounds):
    """Median seconds a decision and a picture, of ours and of theirs."""
    spawn, sides = multiprocessing.get_context("spawn"), []
    for side, decisions in ((ours, 40), (theirs, 5)):
        pipe, far_end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(side, domain, task, size, far_end), daemon=True)
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
    tasks = ["metaworld:drawer-open", "metaworld:door-open", "kitchen:slide-door-open"]
    parser.add_argument("--tasks", nargs="+", default=tasks, help="domain:task")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out, rows = ROOT / "results" / "benchmarks", {}
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, len(args.tasks) * len(args.sizes), squeeze=False, figsize=(16, 6))
    for column, (task, size) in enumerate((task, size) for size in args.sizes for task in args.tasks):
        domain, _, task = task.partition(":")
        medians, pictures = compare(domain, task, size, args.rounds)
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
