"""The environment in a worker process, which runs episodes on demand. It imports neither torch nor a stage."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np


class EpisodeWorker(gym.Env):
    """Runs the (task, seed) that each reset names, and makes a new environment when the task changes.

    make: a domain's `make`. task: the first one. index: this worker's key in the reset options.
    """

    def __init__(self, make: Callable[[str, int], gym.Env], task: str, image_size: int, index: int):
        self.make = make
        self.image_size = image_size
        self.index = index
        self.task = task
        self.idle = False
        self.env = make(task, image_size)
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Reset to options["episode"][index], a (task, seed), or idle if that is None."""
        episode = options["episode"][self.index]
        self.idle = episode is None
        if self.idle:
            return np.zeros(self.observation_space.shape, np.uint8), {}
        task, seed = episode
        if task != self.task:
            self.env.close()
            self.task = task
            self.env = self.make(task, self.image_size)
        return self.env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.idle:
            return np.zeros(self.observation_space.shape, np.uint8), 0.0, False, False, {}
        return self.env.step(action)

    def close(self) -> None:
        self.env.close()
