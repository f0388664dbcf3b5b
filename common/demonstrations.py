"""Record D_e: episodes of a domain's scripted expert, in worker processes that import no torch."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from common.episode_file import EXPERT_SEED, EpisodeInfo, episode_ids, open_episode, write_episode
from common.errors import UserError
from common.processes import starting_workers

MAX_ATTEMPTS = 10  # attempts for each demonstration, before the expert is called broken
_env = {}  # the environment of this worker process, by (task, image size): one at a time


@dataclass(frozen=True)
class Recording:
    """How demonstrations are recorded: what an attempt needs besides its task and number."""

    make: Callable  # the domain's
    expert: Callable  # the domain's
    domain: str
    instructions: dict[str, str]
    protocol: dict
    image_size: int
    action_noise_std: float
    random_burst_prob: float
    root: Path  # D_e/<domain>

    def noise(self) -> dict[str, float]:
        """Return what is added to the expert's actions."""
        return {
            "action_noise_std": float(self.action_noise_std),
            "random_burst_prob": float(self.random_burst_prob),
        }

    def lacking(self, tasks: list[str], num_demos: int) -> list[str]:
        """Return the tasks that have fewer than `num_demos` episodes."""
        return [task for task in tasks if len(episode_ids(self.root / task)) < num_demos]


def check_present(recording: Recording, tasks: list[str], num_demos: int, asked: set[str]) -> None:
    """Check the episodes that are there already: none too many, and recorded with the same noise.

    num_demos: demonstrations per task; 0: all that are there. asked: which of "demos" and the
    entries of `Recording.noise` the user has chosen. The noise counts also if episodes are yet to
    be recorded. Raises UserError.
    """
    wanted = recording.noise()
    if recording.lacking(tasks, num_demos):
        asked = asked | set(wanted)
    for task in tasks:
        folder = recording.root / task
        present = episode_ids(folder)
        if "demos" in asked and len(present) > num_demos > 0:
            raise UserError(
                f"{folder} holds {len(present)} episodes, more than --demos {num_demos}: "
                f"use --demos 0 to train on all of them, or another --data"
            )
        if not present:
            continue
        _, header = open_episode(folder / f"{present[0]:06d}.safetensors")
        found = json.loads(header.get("noise", "{}"))  # unknown in imported and older episodes
        for name in sorted(asked & set(found)):
            if found[name] != wanted[name]:
                raise UserError(
                    f"{folder} was recorded with {name} {found[name]}, not {wanted[name]}: "
                    f"use the same --{name.replace('_', '-')}, or another --data"
                )


def follow_parent() -> None:
    """Leave Ctrl-C to the main process, and end with it even if it is killed: nothing else would end this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def record_attempt(recording: Recording, task: str, k: int) -> str:
    """Run the expert from initial state k. Write the episode if it succeeds. Return the task.

    Noise is added to every dimension but the last (the gripper, if any). With probability
    `random_burst_prob` a step begins a burst of 2 to 5 random actions. The label is the expert's
    own action (stage0_sft.py).
    """
    if (task, recording.image_size) not in _env:
        for env in _env.values():
            env.close()
        _env.clear()
        _env[task, recording.image_size] = recording.make(task, recording.image_size)
    env = _env[task, recording.image_size]
    rng = np.random.default_rng([EXPERT_SEED + k, 1])
    images, actions, rewards = [], [], []
    burst_left = 0
    terminated = truncated = False
    obs, _ = env.reset(seed=EXPERT_SEED + k)
    while not (terminated or truncated):
        action = recording.expert(env)
        images.append(obs)
        actions.append(action)
        executed = action.copy()
        executed[:-1] += rng.normal(0, recording.action_noise_std, len(action) - 1)
        if (
            recording.random_burst_prob
            and not burst_left
            and rng.random() < recording.random_burst_prob
        ):
            burst_left = int(rng.integers(2, 6))
            burst = rng.uniform(-1, 1, len(action))
        if burst_left:
            burst_left -= 1
            executed = burst
        obs, reward, terminated, truncated, _ = env.step(executed.clip(-1, 1).astype(np.float32))
        rewards.append(reward)
    if terminated:
        info = EpisodeInfo(
            domain=recording.domain,
            task=task,
            instruction=recording.instructions[task],
            source="expert",
            seed=EXPERT_SEED + k,
            protocol=recording.protocol,
            noise=recording.noise(),
        )
        write_episode(
            recording.root / task / f"{k:06d}.safetensors", images, actions, rewards, info
        )
    return task


def next_attempts(root: Path, task: str, tried: int, num_demos: int) -> tuple[list[int], int]:
    """Return (numbers of the attempts to make now, attempts tried after them) of a task that lacks demonstrations."""
    done = set(episode_ids(root / task))
    until = max(num_demos, tried + num_demos - len(done))
    # After a restart `tried` is 0, so failed attempts are made again. An attempt depends on its
    # seed alone.
    return [k for k in range(tried, until) if k not in done], until


def collect_demonstrations(
    domain: ModuleType, recording: Recording, num_demos: int, num_workers: int
) -> None:
    """Record attempts 0, 1, 2, ... of each expert task until `num_demos` have succeeded. Resumes if interrupted.

    Raises UserError if an expert fails too often, and if a worker process was killed.
    """
    root = recording.root
    tried = dict.fromkeys(domain.EXPERT_TASKS, 0)
    have = {task: len(episode_ids(root / task)) for task in tried}
    bar = tqdm(
        desc="D_e: expert episodes",
        total=num_demos * len(tried),
        initial=sum(have.values()),
        smoothing=0.05,
    )
    context = multiprocessing.get_context("forkserver")
    with starting_workers():
        pool = ProcessPoolExecutor(num_workers, context, follow_parent)
    try:
        lacking = recording.lacking(domain.EXPERT_TASKS, num_demos)
        while lacking:
            jobs = []
            for task in lacking:
                numbers, until = next_attempts(root, task, tried[task], num_demos)
                if until > MAX_ATTEMPTS * num_demos:
                    raise UserError(
                        f"the scripted expert of {task} solved only {have[task]} of {tried[task]} episodes: "
                        f"fix expert() in domains/{domain.NAME}.py"
                    )
                jobs += [(task, k) for k in numbers]
                tried[task] = until
            with starting_workers():  # a submission may start processes
                attempts = [pool.submit(record_attempt, recording, task, k) for task, k in jobs]
            for attempt in attempts:
                task = attempt.result()
                n = len(episode_ids(root / task))
                bar.update(n - have[task])
                have[task] = n
            lacking = recording.lacking(domain.EXPERT_TASKS, num_demos)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that records demonstrations ended without an error of its own above: it was "
            "killed, most often because memory ran out; use a smaller --threads, and the same command resumes"
        ) from error
    finally:
        bar.close()
        stop_pool(pool)


def stop_pool(pool: ProcessPoolExecutor) -> None:
    """End the worker processes at once, also in the middle of an episode: files are written atomically."""
    for worker in list((pool._processes or {}).values()):
        worker.kill()
    pool.shutdown()  # pending work then ends as broken; to cancel it too makes Python 3.11 print a traceback
