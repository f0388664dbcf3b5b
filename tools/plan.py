"""
Plan a run: what Algorithm 1 will do, and the memory, disk and time that it takes on this machine.

What does not fit into free memory or disk is refused, with settings that would fit. Memory is an
estimate from the VLM's configuration. Time is measured for a few seconds, if the VLM's weights are
on this machine. What cannot be known before is taken at its largest: every episode as long as the
horizon, RL until its budget is spent. For the minutes, an episode takes half of the horizon.

    python -m tools.plan --domain NAME
    python -m tools.plan --domain NAME --vlm /models/blip2 --stage0="--lora-targets language"
"""

from dataclasses import dataclass
from typing import Literal

from common.cli import parse

Method = Literal["ire-vla", "ire-vla-freeze", "ppo-replay", "rl-lora", "sft-only"]


@dataclass
class Args:
    domain: str  # name of a file in domains/
    vlm: str = "tiny"  # tiny, a BLIP-2 folder, or a hub name (Salesforce/blip2-opt-2.7b)
    rounds: int | None = None  # rounds of RL and SFT (default: one for each RL task)
    method: Method = "ire-vla"  # METHOD of loop.sh
    seed: int = 0  # seed of the run, only printed
    run: str = ""  # folder of the run (default: runs/<domain>-seed<seed>)
    data: str = "runs/D_e"  # folder of the expert episodes
    stage0: str = ""  # more arguments of stage0_sft.py, as in --stage0="--batch 64"
    rl: str = ""  # more arguments of stage_rl.py
    sft: str = ""  # more arguments of stage_sft.py


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import torch
import tyro

import sacfd
import stage0_sft
import stage_rl
import stage_sft
from common.backbone import build_tiny, pick_dtype, read_config
from common.cli import check_numbers
from common.cpus import usable_cpus
from common.devices import check_memory, free_memory, pick_device
from common.episode_file import episode_ids
from common.errors import UserError, run_cli
from common.files import read_json
from common.rates import all_tasks, splits
from domains import load_domain, robot_reason
from report import stage_order
from tools.costs import SFT_COPIES, VLACosts, measure_speed, vla_costs, weights_are_here

MIN_PROCESS_BYTES = 20_000_000  # least memory of a worker process
ENV_STEPS = {"ppo": stage_rl.ENV_STEPS, "sacfd": sacfd.ENV_STEPS}  # default budgets


class Plan:
    """What is left of a run, and each stage's arguments."""

    def __init__(self, args: Args):
        check_numbers(args)
        self.domain = load_domain(args.domain)
        self.rounds = len(self.domain.RL_TASKS) if args.rounds is None else args.rounds
        self.run = Path(args.run or f"runs/{args.domain}-seed{args.seed}")
        self.data = Path(args.data) / args.domain
        self.vlm = args.vlm
        self.done = [stage.name for stage in stage_order(self.run)]
        if "0-sft" in self.done:  # loop.sh's START, perhaps of another VLM
            self.vlm = read_json(self.run / "0-sft/config.json")["vlm"]
        common = ["--domain", args.domain, "--out", ""]
        self.stage0 = tyro.cli(
            stage0_sft.Args, args=[*common, "--vlm", self.vlm, *args.stage0.split()]
        )
        rl = [*common, "--parent", "", "--task", self.domain.RL_TASKS[0]]
        self.rl = tyro.cli(stage_rl.Args, args=[*rl, *args.rl.split()])
        self.sft = tyro.cli(stage_sft.Args, args=[*common, "--parent", "", *args.sft.split()])
        for args_of_stage in (self.stage0, self.rl, self.sft):
            check_numbers(args_of_stage)
        for args_of_stage in (self.stage0, self.sft):
            args_of_stage.batch = args_of_stage.batch or self.domain.SFT_BATCH
        self.dtype_reason = "--dtype"
        if not self.stage0.dtype:
            self.stage0.dtype, self.dtype_reason = pick_dtype(self.vlm)
        self.demos = self.domain.DEMOS_PER_TASK if self.stage0.demos is None else self.stage0.demos
        self.algo = self.rl.algo or self.domain.RL_ALGORITHM
        self.env_steps = ENV_STEPS[self.algo] if self.rl.env_steps is None else self.rl.env_steps
        self.stages = self.all_stages(args.method)
        self.left = [stage for stage in self.stages if stage not in self.done]

    def all_stages(self, method: str) -> list[str]:
        """Return the names of the run's stages in the order of Algorithm 1."""
        names = ["0-sft"]
        for i in range(1, self.rounds + 1):
            if method != "sft-only":
                names.append(f"{i}-rl-{self.domain.RL_TASKS[(i - 1) % len(self.domain.RL_TASKS)]}")
            if method != "rl-lora":
                names.append(f"{i}-sft")
        return names

    def count(self, kind: str) -> int:
        """Return how many stages are left of a kind: "0-sft", "rl" or "sft" (stage 2)."""
        if kind == "0-sft":
            return int("0-sft" in self.left)
        return len([s for s in self.left if s != "0-sft" and s.split("-")[1] == kind])

    def missing_demos(self) -> int:
        """Return how many demonstrations are yet to be recorded, by stage 0, or by stage 2 if there are none."""
        present = [len(episode_ids(self.data / task)) for task in self.domain.EXPERT_TASKS]
        if "0-sft" not in self.left and (any(present) or not self.count("sft")):
            return 0
        return sum(max(0, self.demos - n) for n in present)


def print_plan(args: Args, plan: Plan) -> None:
    """Print the stages, those that are done, and the folder."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {usable_cpus()} cores"
    )
    tasks = ", ".join(f"{len(names)} {split}" for split, names in splits(plan.domain).items())
    print(
        f"{args.method} on {args.domain}, tasks: {tasks}; VLM {plan.vlm}, seed {args.seed}, {device}"
    )
    print("stages: " + "  ".join(s if s in plan.left else f"[done] {s}" for s in plan.stages))
    print(
        f"folder: {plan.run}  (watch: tensorboard --logdir {plan.run}; after Ctrl-C the same command resumes)"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_d_e(plan: Plan) -> None:
    """Raise UserError if some tasks of D_e are missing and stage 0 is done: stage 2 would fail hours later.

    If all are missing, stage 2 records them. Prints the tasks that have fewer than planned.
    """
    present = {task: len(episode_ids(plan.data / task)) for task in plan.domain.EXPERT_TASKS}
    missing = [task for task, n in present.items() if not n]
    few = [task for task, n in present.items() if 0 < n < plan.demos]
    if few:
        print(
            f"D_e: {len(few)} of {len(present)} tasks with fewer than {plan.demos} episodes, such as {few[0]} with "
            f"{present[few[0]]}; stage 2 trains on what is in {plan.data}"
        )
    if len(missing) < len(plan.domain.EXPERT_TASKS):
        # Stage 0 refuses a --demos below what a task has.
        demos = max(plan.demos, *present.values())
        for task in missing:
            raise UserError(
                f"{plan.data / task} holds no episodes, although stage 0 is finished: restore them, or "
                f"record them again: python stage0_sft.py --domain {plan.domain.NAME} --data {plan.data.parent} "
                f"--demos {demos} --image-size {plan.stage0.image_size} --out {plan.run}-again/0-sft "
                f"--steps 0 --episodes 0"
            )


def format_parts(name: str, parts: dict[str, float]) -> str:
    return (
        f"{name}: {', '.join(f'{part} {size / 1e9:,.2f}' for part, size in parts.items())}; in all"
    )


def check_processes(number: int, what: str, env_bytes: int, remedy: str) -> None:
    """Check that processes with an environment each fit into memory. Raises UserError."""
    check_memory(number * env_bytes, torch.device("cpu"), f"{number} processes {what}", remedy)


def check_sft(name: str, args, costs: VLACosts, trains_vlm: bool, device: torch.device) -> None:
    """Check that an SFT stage fits into memory. Raises UserError with settings that would fit."""
    trained = costs.trained_bytes(trains_vlm)
    sample = costs.activation_bytes(trains_vlm, args.checkpointing)
    fixed = {"weights": costs.weights, "gradients, moments and average": SFT_COPIES * trained}
    parts = fixed | {"activations": sample * math.ceil(args.batch / args.accumulate)}
    if os.environ.get("SFT_LAUNCH"):  # the memory of another machine, or of several processes
        print(
            f"{format_parts(name, parts)} {sum(parts.values()) / 1e9:,.2f} GB, less if processes share the batch"
        )
        return
    room = free_memory(device) - sum(fixed.values())
    remedies = []
    if room > 2 * sample:  # a tenth is left for other programs
        remedies.append(f"--accumulate {math.ceil(args.batch * sample / (0.9 * room))}")
    if room > 0 and not args.checkpointing:
        remedies.append("--checkpointing")
    if room > 0 and costs.lora_targets == "all":
        remedies.append("--lora-targets language --cache")
    remedies.append("a smaller --vlm")
    check_memory(
        sum(parts.values()), device, format_parts(name, parts), f"use {' or '.join(remedies)}"
    )


def check_rl(plan: Plan, costs: VLACosts, env_bytes: int, device: torch.device) -> None:
    """Check that stage 1 fits into memory. Raises UserError with settings that would fit."""
    args = plan.rl
    trained = costs.trained_bytes(args.train_vlm)
    sample = costs.activation_bytes(args.train_vlm)
    parts = {"weights": costs.weights, "gradients, moments, best head": 2 * 4 * trained}
    if plan.algo == "ppo":
        parts["PPO's rollout"] = 2 * args.envs * (args.rollout + 1) * costs.tokens * costs.width
        parts["activations"] = sample * args.minibatch
        remedy = "use a smaller --envs, --rollout or --minibatch, or a smaller --vlm"
    else:
        # A GPU's memory is taken at once, also for rows that would only reset an environment.
        rows = plan.env_steps * (2 if device.type == "cuda" else 1)
        parts["SACfD's buffer"] = 2 * rows * costs.tokens * costs.width
        parts["activations"] = 2 * sample * args.sacfd.batch
        remedy = "use a smaller --envs or --env-steps, or a smaller --vlm"
    if device.type == "cpu":
        parts[f"{args.envs} environments"] = args.envs * env_bytes
    else:
        check_processes(args.envs, "with an environment each", env_bytes, "use a smaller --envs")
    check_memory(sum(parts.values()), device, format_parts("RL", parts), remedy)


def check_disk(plan: Plan, costs: VLACosts) -> None:
    """Check that the disk holds what is left to write. Raises UserError.

    A state is written next to the one before it, so there are two for a moment.
    """
    horizon = plan.domain.PROTOCOL["horizon"]
    demo_frames = plan.missing_demos() * horizon
    online_frames = plan.count("rl") * plan.rl.successes * horizon
    latents = 2 * costs.tokens * costs.width
    trained = costs.trained_bytes(vlm=True)
    parts = {
        "D_e": demo_frames * 3 * plan.stage0.image_size**2,
        "D_rl": online_frames * 3 * plan.stage0.image_size**2,
        "checkpoints": len(plan.left) * trained,
        "states": 2 * 4 * trained + (plan.env_steps * latents if plan.algo == "sacfd" else 0),
    }
    if plan.stage0.cache:
        parts["image tokens"] = (demo_frames + online_frames) * latents
    run = plan.run.resolve()
    place = next(p for p in (run, *run.parents) if p.exists())
    need = sum(parts.values())
    free = shutil.disk_usage(place).free
    disk = f"{need / 1e9:,.2f} GB of the {free / 1e9:,.2f} GB that are free on {place}"
    sentence = f"{format_parts('disk', parts)} {disk}"
    if need > free:
        raise UserError(
            f"{sentence}: use fewer --demos or --successes, or put runs/ on another disk"
        )
    print(sentence)


# ----------------------------------------------------------------------------------------------------------------------
# Time


def measure_env(domain: ModuleType, image_size: int) -> tuple[int, int, float]:
    """Return (A, bytes, seconds per step) of one environment in this process. A real robot does not move: 0 seconds."""
    process = psutil.Process()
    before = process.memory_info().rss
    env = domain.make(domain.RL_TASKS[0], image_size)
    try:
        A = env.action_space.shape[0]
        if robot_reason(domain):
            return A, 0, 0.0
        rng = np.random.default_rng(0)
        env.reset(seed=0)
        began = time.perf_counter()
        for _ in range(15):
            env.step(rng.uniform(-0.3, 0.3, A).astype(np.float32))
        seconds = (time.perf_counter() - began) / 15
        return A, max(MIN_PROCESS_BYTES, process.memory_info().rss - before), seconds
    finally:
        env.close()


def print_minutes(plan: Plan, speed, env_seconds: float, device: torch.device) -> None:
    """Print how long each kind of stage takes, and all that is left."""
    cpus = usable_cpus()
    length = plan.domain.PROTOCOL["horizon"] / 2  # mean steps of an episode, as a guess
    # The environments use all cores. Encoding takes its time from them on a CPU, and runs at the
    # same time on a GPU.
    act = (env_seconds + speed.encode) / cpus
    if device.type == "cuda":
        act = max(env_seconds / cpus, speed.encode)
    update = speed.sft_sample if plan.rl.train_vlm else 2 * speed.head_sample  # head and critic
    updates = plan.rl.epochs if plan.algo == "ppo" else 3 * plan.rl.sacfd.utd * plan.rl.sacfd.batch
    steps0 = plan.domain.STAGE0_STEPS if plan.stage0.steps is None else plan.stage0.steps
    steps2 = plan.domain.STAGE2_STEPS if plan.sft.steps is None else plan.sft.steps
    episode = length * act
    evaluation = len(all_tasks(plan.domain)) * episode  # an episode of each task
    seconds = {  # a stage's, and the number of them
        "D_e": (plan.missing_demos() * length * env_seconds / cpus, 1),
        "stage 0": (
            steps0 * plan.stage0.batch * speed.sft_sample + plan.stage0.episodes * evaluation,
            plan.count("0-sft"),
        ),
        "RL at most": (
            plan.env_steps * (act + update * updates)
            + 2 * plan.rl.successes * length * act
            + plan.rl.episodes * (evaluation if plan.rl.all_tasks else episode),
            plan.count("rl"),
        ),
        "stage 2": (
            steps2 * plan.sft.batch * speed.sft_sample + plan.sft.episodes * evaluation,
            plan.count("sft"),
        ),
    }
    total = sum(one * number for one, number in seconds.values())
    print(
        f"speed: {1 / speed.encode:,.1f} images/s encoded, {1 / speed.sft_sample:,.1f} samples/s in SFT"
    )
    each = ", ".join(f"{name} {one / 60:,.1f}" for name, (one, number) in seconds.items() if number)
    print(f"minutes: {each}; all that is left {total / 60:,.0f}")


def main(args: Args) -> None:
    plan = Plan(args)
    print_plan(args, plan)
    if not plan.left:
        return
    if "0-sft" not in plan.left:
        check_d_e(plan)
    device = pick_device(plan.stage0.device)
    instructions = sorted(set(plan.domain.INSTRUCTIONS.values()))
    action_dim, env_bytes, env_seconds = measure_env(plan.domain, plan.stage0.image_size)
    with tempfile.TemporaryDirectory() as folder:
        source = plan.vlm
        if source == "tiny":
            source = str(Path(folder) / "vlm")
            build_tiny(source, instructions, plan.stage0.image_size)
        costs = vla_costs(read_config(source), plan.stage0, action_dim, instructions)
        print(
            f"VLM: {costs.parameters / 1e6:,.2f} M weights, theta {costs.theta / 1e6:,.2f} M; latents of an image: "
            f"{costs.tokens} x {costs.width}; {plan.stage0.dtype}: {plan.dtype_reason}"
        )
        if plan.missing_demos():
            check_processes(
                plan.stage0.threads, "that record D_e", env_bytes, "use a smaller --threads"
            )
        if plan.count("0-sft"):
            check_sft("stage 0", plan.stage0, costs, True, device)
        if plan.count("rl"):
            check_rl(plan, costs, env_bytes, device)
        if plan.count("sft"):
            check_sft("stage 2", plan.sft, costs, not plan.sft.freeze_vlm, device)
        check_disk(plan, costs)
        if weights_are_here(source):
            speed = measure_speed(plan.stage0, action_dim, instructions, Path(folder), device)
            print_minutes(plan, speed, env_seconds, device)
        else:
            print(
                f"minutes: not measured, because the weights of {plan.vlm} are not on this machine yet"
            )


if __name__ == "__main__":
    run_cli(main, ARGS, resumes=False)
