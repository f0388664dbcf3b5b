"""A rendered decision of our domains beside the stock environment's, at the same size. python benchmarks/render.py

A decision is some steps of physics and one picture. In the kitchen ours is two views of half the size, so there are
two ratios: against as many stock pictures, whole ones, for a stock picture takes as long at any size; and against one.
Theirs is gym.make("Meta-World/MT1" or "FrankaKitchen-v1", render_mode="rgb_array"), as many step() and render(), with
the camera put where ours is and Mesa's threads as they come. Each simulator has a process of its own (two MuJoCo
renderers in one process can corrupt each other); one or two of them work at the same time, and the sides take turns,
so that only one side does. Medians over rounds of the decisions a second of all processes. Writes
results/benchmarks/render.json and render.png.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "egl")

from benchmarks._turns import RESULTS, keep, row  # noqa: E402


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


def theirs(domain, task, size, views=None):
    """views: pictures of a decision; None: as many as ours shows."""
    import numpy as np

    module = importlib.import_module(f"domains.{domain}")  # it also registers Meta-World's environments
    os.environ.pop("LP_NUM_THREADS", None)  # and tells Mesa to use no threads, which is a choice of ours
    view = module.CAMERA | {"lookat": np.array(module.CAMERA["lookat"])}
    settings = {"render_mode": "rgb_array", "width": size, "height": size, "disable_env_checker": True}
    env = STOCK[domain](task, view, settings)
    env.reset(seed=0)

    def step(action):
        for _ in range(module.ACTION_REPEAT):
            env.step(action)
        return [env.render() for _ in range(views or module.VIEWS)][0]

    return env, step, env.render


def one_picture(domain, task, size):
    return theirs(domain, task, size, views=1)


def serve(side, domain, task, size, pipe):
    """Times as many decisions as the pipe asks for, when it says go; at the end sends a picture of the first state."""
    import numpy as np

    env, step, draw = side(domain, task, size)
    rng = np.random.default_rng(0)
    first = np.array(draw())
    step(np.zeros(env.action_space.shape, np.float32))
    while decisions := pipe.recv():
        env.reset()
        pipe.send("ready")
        pipe.recv()
        start = time.perf_counter()
        for _ in range(decisions):
            step(rng.uniform(-0.3, 0.3, env.action_space.shape).astype(np.float32))
        pipe.send(time.perf_counter() - start)
    pipe.send(first)
    env.close()


def compare(domain, task, size, rounds, processes, sides):
    """{side: median decisions a second of all its processes}, {side: a picture}; sides: {side: (make, decisions)}."""
    spawn, workers, rates = multiprocessing.get_context("spawn"), {}, {side: [] for side in sides}
    for side, (make, _) in sides.items():
        workers[side] = []
        for _ in range(processes):
            pipe, far_end = spawn.Pipe()
            process = spawn.Process(target=serve, args=(make, domain, task, size, far_end), daemon=True)
            process.start()
            far_end.close()
            workers[side].append((pipe, process))
    for _ in range(rounds):
        for side, (_, decisions) in sides.items():
            for message in (decisions, "go"):
                for pipe, _ in workers[side]:
                    pipe.send(message)
                answers = [pipe.recv() for pipe, _ in workers[side]]
            rates[side].append(sum(decisions / seconds for seconds in answers))
    pictures = {}
    for side, pairs in workers.items():
        for pipe, process in pairs:
            pipe.send(0)
            pictures[side] = pipe.recv()
            process.join()
    return {side: sorted(values)[len(values) // 2] for side, values in rates.items()}, pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = ["metaworld:drawer-open", "metaworld:door-open", "kitchen:slide-door-open"]
    parser.add_argument("--tasks", nargs="+", default=tasks, help="domain:task")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="simulators at the same time")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(args.tasks) * len(args.sizes), squeeze=False, figsize=(16, 6))
    for column, (task, size) in enumerate((task, size) for size in args.sizes for task in args.tasks):
        domain, _, task = task.partition(":")
        views = importlib.import_module(f"domains.{domain}").VIEWS
        sides = {"ours": (ours, 40), f"{views} stock pictures" if views > 1 else "stock": (theirs, 5)}
        sides |= {"one stock picture": (one_picture, 5)} if views > 1 else {}
        for processes in args.processes:
            rates, pictures = compare(domain, task, size, args.rounds, processes, sides)
            for side in list(sides)[1:]:
                name = f"{task}, {size} px, rendered decisions/s, processes {processes}, beside {side}"
                keep("render", {name: row(rates["ours"], rates[side], rates["ours"] / rates[side])})
        for axis, (label, picture) in zip(axes[:, column], pictures.items()):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(f"{'ours' if label == 'ours' else 'stock'}, {task}, {size} px", fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(RESULTS / "render.png", dpi=100)


if __name__ == "__main__":
    main()
