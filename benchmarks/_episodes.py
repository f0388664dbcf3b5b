"""Episodes of noise in the project's format."""

from pathlib import Path

import numpy as np

from common.episode_file import EpisodeInfo, write_episode
from domains import metaworld


def write_noise_episode(
    path: str | Path, task: str, seed: int = 0, length: int = 40, image_size: int = 64
) -> None:
    """Write one Meta-World episode of random images and actions, a success at its end."""
    rng = np.random.default_rng(seed)
    info = EpisodeInfo(
        domain=metaworld.NAME,
        task=task,
        instruction=metaworld.INSTRUCTIONS[task],
        source="expert",
        seed=seed,
        protocol=metaworld.PROTOCOL,
    )
    image = rng.integers(0, 256, (length, image_size, image_size, 3))
    action = rng.uniform(-1, 1, (length, 4))
    reward = np.zeros(length)
    reward[-1] = 1
    write_episode(path, image, action, reward, info)
