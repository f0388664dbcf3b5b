"""Compare a rendered environment step of our domains with the stock environment's, at the same image size.

    python -m benchmarks.render

An environment step is some steps of physics and one image. In the kitchen and in Meta-World, our
image consists of two views of half the size. So there are two ratios: against two stock images of
full size, because a stock image takes as long at any size, and against one.

The stock side is gym.make("Meta-World/MT1" or "FrankaKitchen-v1", render_mode="rgb_array") with our
camera's pose and Mesa's default threads. Each environment has its own process, because two MuJoCo
renderers in one process can corrupt each other. One or two processes of a side work at the same
time, and the sides take turns. The numbers are medians over rounds of the environment steps a
second of all processes. Writes results/benchmarks/render.json and render.png.
"""

import argparse
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from benchmarks._turns import RESULTS, row, save_rows
from common.figures import pyplot
from domains import load_domain

# A side's functions: make the environment; execute an action and render; render.
Side = tuple[object, Callable, Callable]


def ours(domain: str, task: str, size: int) -> Side:
    env = load_domain(domain).make(task, size)
    env.reset(seed=0)
    return env, lambda action: env.step(action)[0], lambda: env.get_image(size)


def stock_metaworld(task: str, camera: dict, settings: dict):
    import gymnasium as gym

    env = gym.make("Meta-World/MT1", env_name=f"{task}-v3", seed=0, **settings)
    env.unwrapped.mujoco_renderer.default_cam_config = camera
    return env


def stock_kitchen(task: str, camera: dict, settings: dict):
    import gymnasium as gym
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(
        "FrankaKitchen-v1",
        tasks_to_complete=["slide cabinet"],
        default_camera_config=camera,
        **settings,
    )


STOCK = {"metaworld": stock_metaworld, "kitchen": stock_kitchen}


def stock(domain: str, task: str, size: int, num_images: int | None = None) -> Side:
    """Return the stock side. num_images: images per environment step (default: the number of our views)."""
    import numpy as np

    # Also registers Meta-World's environments.
    module = importlib.import_module(f"domains.{domain}")
    os.environ.pop("LP_NUM_THREADS", None)  # our own setting for Mesa
    camera = module.CAMERA | {"lookat": np.array(module.CAMERA["lookat"])}
    settings = {
        "render_mode": "rgb_array",
        "width": size,
        "height": size,
        "disable_env_checker": True,
    }
    env = STOCK[domain](task, camera, settings)
    env.reset(seed=0)

    def step(action):
        for _ in range(module.ACTION_REPEAT):
            env.step(action)
        return [env.render() for _ in range(num_images or module.NUM_VIEWS)][0]

    return env, step, env.render


def one_stock_image(domain: str, task: str, size: int) -> Side:
    return stock(domain, task, size, num_images=1)


def serve(side: Callable, domain: str, task: str, size: int, pipe: Connection) -> None:
    """Time as many environment steps as the pipe asks for, after its "go". At the end send the first state's image."""
    import numpy as np

    env, step, render = side(domain, task, size)
    rng = np.random.default_rng(0)
    first = np.array(render())
    step(np.zeros(env.action_space.shape, np.float32))
    while steps := pipe.recv():
        env.reset()
        pipe.send("ready")
        pipe.recv()
        began = time.perf_counter()
        for _ in range(steps):
            step(rng.uniform(-0.3, 0.3, env.action_space.shape).astype(np.float32))
        pipe.send(time.perf_counter() - began)
    pipe.send(first)
    env.close()


def start_workers(side: Callable, domain: str, task: str, size: int, processes: int) -> list:
    """Return (pipe, process) of each worker of a side."""
    spawn = multiprocessing.get_context("spawn")
    workers = []
    for _ in range(processes):
        pipe, far_end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(side, domain, task, size, far_end), daemon=True)
        process.start()
        far_end.close()
        workers.append((pipe, process))
    return workers


def steps_per_second(workers: list, steps: int) -> float:
    """Return the environment steps a second of all of a side's workers."""
    for message in (steps, "go"):
        for pipe, _ in workers:
            pipe.send(message)
        answers = [pipe.recv() for pipe, _ in workers]
    return sum(steps / seconds for seconds in answers)


def compare(workers: dict[str, list], steps: dict[str, int], rounds: int) -> tuple[dict, dict]:
    """Return ({side: median environment steps a second}, {side: an image}), and end the workers."""
    rates = {side: [] for side in workers}
    for _ in range(rounds):
        for side in workers:
            rates[side].append(steps_per_second(workers[side], steps[side]))
    images = {}
    for side, pairs in workers.items():
        for pipe, process in pairs:
            pipe.send(0)
            images[side] = pipe.recv()
            process.join()
    medians = {side: sorted(values)[len(values) // 2] for side, values in rates.items()}
    return medians, images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = ["metaworld:drawer-open", "metaworld:door-open", "kitchen:slide-door-open"]
    parser.add_argument("--tasks", nargs="+", default=tasks, help="domain:task")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[64, 224], help="image sizes in pixels"
    )
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2], help="environments at the same time"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    args = parser.parse_args()

    plt = pyplot()
    columns = [(name, size) for size in args.sizes for name in args.tasks]
    figure, axes = plt.subplots(2, len(columns), squeeze=False, figsize=(16, 6))
    for column, (name, size) in enumerate(columns):
        domain, _, task = name.partition(":")
        views = load_domain(domain).NUM_VIEWS
        sides = {"ours": ours, f"{views} stock images": stock, "one stock image": one_stock_image}
        if views == 1:
            sides = {"ours": ours, "one stock image": one_stock_image}
        steps = {side: 40 if side == "ours" else 5 for side in sides}
        for processes in args.processes:
            workers = {
                side: start_workers(make, domain, task, size, processes)
                for side, make in sides.items()
            }
            rates, images = compare(workers, steps, args.rounds)
            for side in list(sides)[1:]:
                measurement = f"{task}, {size} px, rendered steps/s, processes {processes}, compared with {side}"
                save_rows(
                    "render",
                    {measurement: row(rates["ours"], rates[side], rates["ours"] / rates[side])},
                )
        for axis, side in zip(axes[:, column], images):
            axis.imshow(images[side], interpolation="nearest")
            axis.set_title(
                f"{'ours' if side == 'ours' else 'stock'}, {task}, {size} px", fontsize=9
            )
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(RESULTS / "render.png", dpi=100)


if __name__ == "__main__":
    main()
