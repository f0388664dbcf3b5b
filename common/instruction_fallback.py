"""Stage 1's fallback for a task that the policy never solves: start from what it does for other instructions.

This is not in the paper. PPO has nothing to learn from where none of 100 episodes succeeds. The
policy is then run with the instructions of the expert tasks; some of them often reach the goal. The
head learns from those successes, by Eq. 2 on their latents, under the task's own instruction.
"""

from collections import Counter
from types import ModuleType

import numpy as np
import torch
from tqdm import tqdm

from common.episode_file import FALLBACK_SEED
from common.rl_learner import Learner, seeded_generator
from common.vector_env import run_episodes

FIRST_ATTEMPTS = 2  # episodes with each other instruction
MORE_ATTEMPTS = 20  # more episodes, with the instructions that succeeded, as often as each did
SFT_STEPS = 500
SFT_BATCH = 256
LR_FACTOR = 5  # times stage 1's learning rate


def instruction_fallback(args, domain: ModuleType, learner: Learner) -> None:
    """Try other tasks' instructions on this task, and train phi on the successes under the task's own instruction.

    Counts attempts in learner.counters["fallback_attempts"], environment steps in
    learner.counters["env_steps"].
    """
    vla = learner.vla
    own = domain.INSTRUCTIONS[args.task]
    others = sorted({domain.INSTRUCTIONS[task] for task in domain.EXPERT_TASKS} - {own})
    tried = FIRST_ATTEMPTS * len(others)
    successes = try_instructions(args, domain, learner, FIRST_ATTEMPTS * others) if others else []
    if not successes:
        tqdm.write(f"no success in 100 episodes, nor in {tried} with other instructions")
        return
    promising = [instruction for instruction, _, _ in successes]
    again = (MORE_ATTEMPTS * promising)[:MORE_ATTEMPTS]
    tried += len(again)
    successes += try_instructions(args, domain, learner, again)
    counts = Counter(instruction for instruction, _, _ in successes).most_common(3)
    best = ", ".join(f"{instruction!r} {n}" for instruction, n in counts)
    tqdm.write(
        f"no success in 100 episodes, but {len(successes)} in {tried} with other instructions: {best}"
    )

    with torch.no_grad():
        encoded = [vla.encode(image, [own] * len(image)) for _, image, _ in successes]
    h = torch.cat([h for h, _ in encoded]).to(torch.bfloat16)  # (n, M, D)
    mask = encoded[0][1][:1]  # (1, M): one instruction
    # (n, A)
    action = torch.from_numpy(np.concatenate([action for _, _, action in successes])).to(vla.device)
    optimizer = torch.optim.Adam(vla.phi(), lr=LR_FACTOR * args.lr)
    generator = seeded_generator(args.seed, learner.counters["fallback_attempts"])
    for _ in range(SFT_STEPS):
        b = torch.randint(len(h), (SFT_BATCH,), generator=generator).to(h.device)
        optimizer.zero_grad()
        error = (vla.mean(h[b].float(), mask) - action[b]) / vla.action_std  # (B, A)
        error.square().mean().backward()  # Eq. 2
        optimizer.step()


def try_instructions(
    args, domain: ModuleType, learner: Learner, instructions: list[str]
) -> list[tuple]:
    """Run one episode with each instruction. Return (instruction, image (T, H, W, 3), action (T, A)) of successes."""
    counters = learner.counters
    begin = FALLBACK_SEED + counters.setdefault("fallback_attempts", 0)
    counters["fallback_attempts"] += len(instructions)
    by_seed = dict(enumerate(instructions, begin))
    act = learner.recording_policy(args, domain)
    successes = {}
    episodes = run_episodes(
        learner.vla,
        domain,
        {args.task: list(by_seed)},
        args.envs,
        act,
        keep_images=True,
        instruction_override=by_seed,
    )
    for episode in episodes:
        counters["env_steps"] += episode["env_steps"]
        if episode["success"]:
            successes[episode["seed"]] = (
                by_seed[episode["seed"]],
                episode["image"],
                episode["action"],
            )
    return [successes[seed] for seed in sorted(successes)]
