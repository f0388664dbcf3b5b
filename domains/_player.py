"""A simulator that plays what it is told: evaluations and D_rl go through tasks and seeds with a few processes."""

import gymnasium as gym
import numpy as np

from domains import load_domain


class Player(gym.Env):
    """A worker process's simulator: plays the (task, seed) that its reset is told, making the task when it changes."""

    def __init__(self, domain_name, task, image_size, index):
        self.domain, self.image_size, self.index = load_domain(domain_name), image_size, index
        self.task, self.env = task, self.domain.make(task, image_size)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def reset(self, *, seed=None, options=None):
        """options["play"][index]: (task, seed), or None to idle."""
        task_seed = options["play"][self.index]
        self.idle = task_seed is None
        if self.idle:
            return np.zeros(self.observation_space.shape, np.uint8), {}
        task, seed = task_seed
        if task != self.task:
            self.env.close()
            self.task, self.env = task, self.domain.make(task, self.image_size)
        return self.env.reset(seed=seed)

    def step(self, action):
        if self.idle:
            return np.zeros(self.observation_space.shape, np.uint8), 0.0, False, False, {}
        return self.env.step(action)

    def close(self):
        self.env.close()
