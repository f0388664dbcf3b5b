"""Environments in processes, and episodes of a policy in them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from common.episode_worker import EpisodeWorker
from common.errors import UserError, resume_hint
from common.processes import starting_workers

gym.logger.min_level = 50  # above ERROR: an environment's exception is raised here, which is enough
NAN_ACTION = (
    "the policy's action is NaN, so this checkpoint cannot act: train it again from its parent"
)
# act(h (B, M, D), mask (B, M), ids) -> (executed (B, A), label (B, A)). ids are B of (task, seed,
# step).
Policy = Callable[
    [torch.Tensor, torch.Tensor, list[tuple[str, int, int]]], tuple[torch.Tensor, torch.Tensor]
]


class VectorEnv(AsyncVectorEnv):
    """Gymnasium's environments in processes. Raises UserError if one of the processes was killed."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Turn a broken pipe to a worker into one sentence."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.close_extras(terminate=True)
            self.closed = True
            raise UserError(
                "an environment's process was killed, most often because memory ran out: "
                f"use a smaller --envs. {resume_hint()}"
            ) from error

    def _check_spaces(self) -> None:
        with self.watch():
            super()._check_spaces()

    def reset_async(self, **kwargs) -> None:
        with self.watch():
            super().reset_async(**kwargs)

    def reset_wait(self, **kwargs) -> tuple[np.ndarray, dict]:
        with self.watch():
            return super().reset_wait(**kwargs)

    def step_async(self, actions: np.ndarray) -> None:
        with self.watch():
            super().step_async(actions)

    def step_wait(self, **kwargs) -> tuple:
        with self.watch():
            return super().step_wait(**kwargs)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Terminate the processes. They are not asked first: nothing in them is worth saving."""
        for process in self.processes:
            process.terminate()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        for process in self.processes:
            process.join()


def make_vector_env(fns: list[Callable[[], gym.Env]], autoreset: AutoresetMode) -> VectorEnv:
    """Return environments in a process each. fns: partials of functions that a worker can import without torch."""
    with starting_workers():
        return VectorEnv(fns, context="forkserver", autoreset_mode=autoreset, copy=False)


def make_policy_envs(fns: list[Callable[[], gym.Env]], vla, autoreset: AutoresetMode) -> VectorEnv:
    """`make_vector_env` for a policy. Raises UserError if its actions do not fit the environments."""
    envs = make_vector_env(fns, autoreset)
    policy_dim = vla.config["action_dim"]
    env_dim = envs.single_action_space.shape[0]
    if policy_dim != env_dim:
        envs.close()
        raise UserError(
            f"the checkpoint's actions have {policy_dim} dimensions, the domain's {env_dim}: "
            f"use a checkpoint of this domain"
        )
    return envs


class EpisodeQueue:
    """Which worker runs which episode: its own task's next, else an untouched task's, else the longest queue's."""

    def __init__(self, seeds_by_task: dict[str, list[int]]):
        self.left = {task: list(seeds) for task, seeds in seeds_by_task.items() if seeds}
        self.untouched = list(self.left)
        self.total = sum(len(seeds) for seeds in self.left.values())
        self.first_task = self.untouched[0] if self.untouched else ""

    def next(self, task: str | None) -> dict | None:
        """Return the next episode for a worker that has just run `task`, or None if there is none left."""
        if not self.left.get(task):
            task = (
                self.untouched.pop(0)
                if self.untouched
                else max(self.left, key=lambda t: len(self.left[t]))
            )
        if not self.left[task]:
            return None
        return {"task": task, "seed": self.left[task].pop(0), "env_steps": 0, "frames": []}


def run_episodes(
    vla,
    domain: ModuleType,
    seeds_by_task: dict[str, list[int]],
    num_envs: int,
    act: Policy,
    keep_images: bool = False,
    instruction_override: dict[int, str] | None = None,
    hold: int = 0,
) -> Iterator[dict]:
    """Run episodes in parallel. Yield {"task", "seed", "success", "env_steps"} as each one ends.

    keep_images: add "image" (T, H, W, 3) uint8, "action" (T, A), the labels, and "reward" (T,) to
        each episode.
    instruction_override: {seed: instruction to use instead of the task's own}.
    hold: after a success the policy acts for so many more steps; "held" is then 1 if the last of
        them is a success too.

    Half of the environments step while the images of the other half pass the VLM.
    """
    queue = EpisodeQueue(seeds_by_task)
    if not queue.total:
        return
    # A process takes as long to start as an episode, so few episodes get few processes.
    num_envs = min(num_envs, queue.total, max(2 * os.cpu_count(), queue.total // 8))
    groups = np.array_split(np.arange(num_envs), min(2, num_envs))
    running: dict[int, dict | None] = {}  # worker -> its episode

    def reset_options(mask: np.ndarray, group: np.ndarray) -> dict:
        episodes = {w: running[w] and (running[w]["task"], running[w]["seed"]) for w in group}
        return {"reset_mask": mask, "episode": episodes}

    def start_step(envs: VectorEnv, group: np.ndarray, obs: np.ndarray) -> None:
        """Encode the images of the running episodes, act, and start the environments' step."""
        actions = np.zeros(envs.action_space.shape, np.float32)
        busy = [i for i, w in enumerate(group) if running[w]]
        if busy:
            episodes = [running[group[i]] for i in busy]
            if instruction_override:
                instructions = [instruction_override[e["seed"]] for e in episodes]
            else:
                instructions = [domain.INSTRUCTIONS[e["task"]] for e in episodes]
            with torch.no_grad():
                h, mask = vla.encode(obs[busy], instructions)
                executed, label = act(
                    h.float(), mask, [(e["task"], e["seed"], e["env_steps"]) for e in episodes]
                )
            if not torch.isfinite(executed).all():
                raise UserError(NAN_ACTION)
            actions[busy] = executed.clamp(-1, 1).cpu().numpy()
            for i, e, a in zip(busy, episodes, label.clamp(-1, 1).cpu().numpy()):
                e["env_steps"] += "success" not in e  # steps after the success are not counted
                if keep_images:
                    e["frames"].append((obs[i].copy(), a))
        envs.step_async(actions)

    fleets = []
    try:
        for group in groups:
            fns = [
                partial(
                    EpisodeWorker, domain.make, queue.first_task, vla.config["image_size"], int(w)
                )
                for w in group
            ]
            fleets.append(make_policy_envs(fns, vla, AutoresetMode.DISABLED))
        for envs, group in zip(fleets, groups):
            for w in group:
                running[w] = queue.next(None)
            obs, _ = envs.reset(options=reset_options(np.ones(len(group), bool), group))
            start_step(envs, group, obs)
        while any(running.values()):
            for envs, group in zip(fleets, groups):
                obs, reward, terminated, truncated, _ = envs.step_wait()
                done = np.zeros(len(group), bool)
                for i, w in enumerate(group):
                    episode = running[w]
                    if episode is None:
                        continue
                    done[i] = is_over(
                        episode, bool(terminated[i]), bool(truncated[i]), float(reward[i]), hold
                    )
                    if done[i]:
                        yield finish_episode(episode, float(reward[i]), keep_images)
                        running[w] = queue.next(episode["task"])
                if done.any():
                    obs, _ = envs.reset(options=reset_options(done, group))
                start_step(envs, group, obs)
    finally:
        for envs in fleets:
            envs.close()


def is_over(episode: dict, terminated: bool, truncated: bool, reward: float, hold: int) -> bool:
    """Note the outcome of an episode's step. Return whether the episode is over: at its end, or `hold` steps later."""
    if "success" not in episode:
        if not (terminated or truncated):
            return False
        episode["success"] = int(terminated)
        episode["held"] = 0
        episode["hold_left"] = hold if terminated else 0
        return episode["hold_left"] == 0
    episode["hold_left"] -= 1
    episode["held"] = int(reward > 0)
    return episode["hold_left"] == 0


def finish_episode(episode: dict, reward: float, keep_images: bool) -> dict:
    """Replace an episode's list of frames by its arrays."""
    frames = episode.pop("frames")
    if keep_images:
        images, actions = zip(*frames)
        episode["image"] = np.stack(images)
        episode["action"] = np.stack(actions)
        episode["reward"] = np.zeros(len(frames), np.float32)
        episode["reward"][-1] = reward
    return episode
