"""
Success rates (paper Table I): the one function that every rate in the project comes from, and its
command.

The greedy policy runs fixed episodes (seeds EVAL_SEED + 0, 1, ...) that no training uses. They are
the same after every stage and for every method, so two policies can be compared episode by episode.
An episode ends at its first success. A rate is k successes of n episodes with its 95 % Wilson
interval. (The paper's rates are multiples of 1/25; it states neither its episodes nor intervals.)

python evaluate.py --checkpoint runs/NAME-seed0/0-sft            all tasks, 25 episodes each, 3 to 8 minutes
python evaluate.py --checkpoint runs/NAME-seed0/0-sft --tasks TASK --episodes 3 --video task.mp4
"""

from dataclasses import dataclass

from common.cli import parse


@dataclass
class Args:
    checkpoint: str  # checkpoint folder, or a hub name such as user/name
    tasks: tuple[str, ...] = ()  # names of the domain's tasks (default: all)
    episodes: int = 25  # episodes per task
    video: str = ""  # instead: record these episodes as this .mp4
    hold: int = 0  # steps after a success at which to check whether it still holds
    out: str = ""  # result file (default: eval.json of the checkpoint, for all tasks)
    envs: int = 16  # maximum number of parallel environments, a process each
    device: str = ""  # cpu, cuda, ... (default: the GPU if there is one)
    threads: int = 1  # CPU threads of torch; the environments use the other cores


if __name__ == "__main__":
    ARGS = parse(Args, __doc__, workers=True)  # before the imports below, which take seconds

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm import tqdm

from common.cli import POSITIVE_ARGS, check_numbers
from common.devices import pick_device, use_threads
from common.episode_file import EVAL_SEED
from common.errors import UserError, run_cli
from common.files import check_writable, make_folder, read_json, write_json
from common.rates import COMMON_PROTOCOL, all_tasks, check_task, summary, wilson
from common.runs import Stage, checkpoint_config
from common.vector_env import NAN_ACTION, run_episodes
from common.versions import versions
from domains import load_domain, robot_reason
from model import VLA, local_checkpoint

VIDEO_FPS = 20

# ----------------------------------------------------------------------------------------------------------------------
# Success rates


def only_simulated(domain: ModuleType, what: str) -> None:
    """Raise UserError if the domain's environments are a real robot: there is one of it, with people near it."""
    reason = robot_reason(domain)
    if reason:
        raise UserError(
            f"{reason}, but {what} is for simulated robots: unset it, or see docs/real_robot.md"
        )


def greedy(vla: VLA):
    """Return the greedy policy for `run_episodes`: the executed action and the label are the head's mean."""

    def act(h: torch.Tensor, mask: torch.Tensor, ids: list) -> tuple[torch.Tensor, torch.Tensor]:
        action = vla.act(h, mask)
        return action, action

    return act


def evaluate(
    vla: VLA,
    domain: ModuleType,
    tasks: Iterable[str],
    episodes: int,
    num_envs: int = 16,
    label: str = "evaluate",
    hold: int = 0,
) -> dict[str, dict]:
    """Return the greedy policy's {task: {"success": [0 or 1, ...], "env_steps": [...]}} on the fixed episodes.

    hold: also return "held": 1 for a success that still holds so many steps later, while the policy
    acts on. Raises UserError for a task that the domain does not have.
    """
    for task in tasks:
        check_task(task, domain)
    seeds = [EVAL_SEED + i for i in range(episodes)]
    result = {
        task: {"success": [None] * episodes, "env_steps": [None] * episodes} for task in tasks
    }
    if hold:
        for row in result.values():
            row["held"] = [None] * episodes
    bar = tqdm(desc=label, total=len(result) * episodes, smoothing=0.05)
    successes = 0
    for episode in run_episodes(
        vla, domain, {task: seeds for task in tasks}, num_envs, greedy(vla), hold=hold
    ):
        row = result[episode["task"]]
        i = episode["seed"] - EVAL_SEED
        row["success"][i] = episode["success"]
        row["env_steps"][i] = episode["env_steps"]
        if hold:
            row["held"][i] = episode["held"]
        successes += episode["success"]
        bar.update()
        bar.set_postfix_str(f"success {successes / max(bar.n, 1):.2f}", refresh=False)
    bar.close()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation of a stage


def held_successes(tasks: dict[str, dict]) -> dict[str, dict]:
    """Return an evaluation in which only successes that held are successes (`evaluate` with `hold`)."""
    return {task: {"success": row["held"]} for task, row in tasks.items()}


def result_file(vla: VLA, domain: ModuleType, tasks: dict[str, dict], hold: int = 0) -> dict:
    """Return the content of eval.json: what was evaluated, and how."""
    protocol = {**COMMON_PROTOCOL, **domain.PROTOCOL, "image_size": vla.config["image_size"]}
    how = {"protocol": protocol, "eval_seed": EVAL_SEED, "versions": versions()}
    return {**how, "tasks": tasks, **({"hold": hold} if hold else {})}


def evaluate_stage(
    folder: Path,
    domain: ModuleType,
    episodes: int,
    device: torch.device,
    num_envs: int = 16,
    vla: VLA | None = None,
    task: str | None = None,
) -> None:
    """Evaluate a finished stage and write eval.json into its folder, once.

    task: the one that stage 1 has learned, and the only one that it is evaluated on. Other
    stages are evaluated on all of the domain's tasks.
    """
    path = Path(folder) / "eval.json"
    if episodes and not path.exists():
        vla = vla or VLA.load(folder, domain.NAME, device)
        tasks = [task] if task else all_tasks(domain)
        result = evaluate(vla, domain, tasks, episodes, num_envs, f"evaluate {path.parent.name}")
        write_json(path, result_file(vla, domain, result))
    if path.exists():
        print(f"{path.parent}: {summary(read_json(path)['tasks'], domain)}")


def own_task(args) -> str | None:
    """Return the task that a stage is evaluated on: stage 1's own. None stands for all of the domain's."""
    return None if getattr(args, "all_tasks", True) else args.task


def skip_if_done(
    stage: Stage, domain: ModuleType, args, device: torch.device, num_envs: int = 16
) -> bool:
    """Return whether the stage is finished already. If so, report it, and evaluate it if that is missing."""
    if args.episodes:
        only_simulated(
            domain, "an evaluation of many episodes at once (--episodes 0 leaves it out)"
        )
    if stage.done and stage.writes:
        print(f"{stage.out} is finished")
        torch.set_num_threads(1)
        evaluate_stage(stage.out, domain, args.episodes, device, num_envs, task=own_task(args))
    return stage.done


# ----------------------------------------------------------------------------------------------------------------------
# The command


def episode_frames(vla: VLA, domain: ModuleType, task: str, seed: int) -> Iterator[np.ndarray]:
    """Yield a greedy episode's frames (H, W, 3) uint8 at the environment's own image size, VIDEO_FPS a second."""
    env = domain.make(task, vla.config["image_size"])
    repeat = max(1, round(VIDEO_FPS / env.metadata.get("render_fps", VIDEO_FPS)))
    obs, _ = env.reset(seed=seed)
    terminated = truncated = False
    while not (terminated or truncated):
        for _ in range(repeat):
            yield env.render()
        with torch.no_grad():
            h, mask = vla.encode(obs[None], [domain.INSTRUCTIONS[task]])
            action = vla.act(h.float(), mask)[0].cpu().numpy()
        if not np.isfinite(action).all():
            raise UserError(NAN_ACTION)
        obs, _, terminated, truncated, _ = env.step(action)
    for _ in range(VIDEO_FPS // 2):  # half a second of the last frame
        yield env.render()
    env.close()


def record_video(
    vla: VLA, domain: ModuleType, tasks: Iterable[str], episodes: int, path: str
) -> None:
    """Write greedy episodes of the tasks as an .mp4."""
    import imageio.v2 as imageio  # only here: it takes a second to import

    for task in tasks:
        check_task(task, domain)
    make_folder(Path(path).parent)
    # Renamed at the end, so that an interrupted video is not taken for a finished one.
    partial = Path(path).with_name(f".{Path(path).name}.partial.mp4")
    with imageio.get_writer(partial, fps=VIDEO_FPS, macro_block_size=2) as writer:
        for task in tasks:
            for i in range(episodes):
                for frame in episode_frames(vla, domain, task, EVAL_SEED + i):
                    writer.append_data(frame)
    os.replace(partial, path)


def main(args: Args) -> None:
    check_numbers(args, (*POSITIVE_ARGS, "episodes"))
    if args.video and not args.video.endswith(".mp4"):
        raise UserError(f"--video must end in .mp4 (got {args.video})")
    if args.video and (args.out or args.hold):
        raise UserError("--video records episodes and measures nothing: leave out --out and --hold")
    use_threads(args.threads)
    folder = local_checkpoint(args.checkpoint)
    domain = load_domain(checkpoint_config(folder)["domain"])
    tasks = list(args.tasks) or all_tasks(domain)
    for task in tasks:
        check_task(task, domain)
    only_simulated(domain, "evaluate.py")
    out = args.out or args.video or ("" if args.tasks else folder / "eval.json")
    if out:  # not after the work
        if Path(out).is_dir():
            raise UserError(f"{out} is a folder: name a file")
        check_writable(make_folder(Path(out).parent), "choose another place with --out")
    vla = VLA.load(folder, device=pick_device(args.device))
    if args.video:
        record_video(vla, domain, tasks, args.episodes, args.video)
        print(f"wrote {args.video}")
        return
    result = evaluate(vla, domain, tasks, args.episodes, args.envs, hold=args.hold)
    for task, row in result.items():
        k = sum(row["success"])
        n = len(row["success"])
        low, high = wilson(k, n)
        held = f"  {sum(row['held'])}/{n} hold after {args.hold} steps" if args.hold else ""
        print(f"  {task:28s} {k / n:.2f}  [{low:.2f}, {high:.2f}]  {k}/{n}{held}")
    print(summary(result, domain))
    if args.hold:
        held = summary(held_successes(result), domain)
        print(f"still a success {args.hold} steps later: {held}")
    if out:
        write_json(out, result_file(vla, domain, result, args.hold))


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
