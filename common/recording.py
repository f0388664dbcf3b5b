"""Record D_rl: successful episodes of the policy, with noise or as it explores."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common.episode_file import ONLINE_SEED, EpisodeInfo, episode_ids, open_episode, write_episode
from common.files import make_folder
from common.vector_env import Policy, run_episodes

MAX_ATTEMPTS = 4  # attempts for each success that is wanted


def step_noise(ids: list[tuple[str, int, int]], like: torch.Tensor) -> torch.Tensor:
    """Return standard normal noise (B, A) that depends on each row's (seed, step) alone."""
    noise = np.stack([np.random.default_rng(row[1:]).normal(size=like.shape[1]) for row in ids])
    return torch.as_tensor(noise, dtype=like.dtype, device=like.device)


def noisy_policy(vla, std: float) -> Policy:
    """Return the policy that records as the expert does: the label is the mean, and noise is added to what is executed.

    The last dimension (the gripper, if any) gets no noise.
    """

    def act(h: torch.Tensor, mask: torch.Tensor, ids: list) -> tuple[torch.Tensor, torch.Tensor]:
        label = vla.act(h, mask)
        noise = step_noise(ids, label)
        noise[:, -1] = 0
        return label + std * noise, label

    return act


@dataclass(frozen=True)
class OnlineRecording:
    """How the policy's successes are recorded."""

    domain: ModuleType
    task: str
    folder: Path  # D_rl/<task>
    num_envs: int
    act: Policy
    executed: bool  # whether the label is the executed action


def record_successes(
    vla, recording: OnlineRecording, first: int, wanted: int
) -> tuple[int, int, int]:
    """Record `wanted` successes as attempts first, first + 1, ... Return (successes, attempts, environment steps).

    Stops after MAX_ATTEMPTS times as many attempts. An attempt depends on its seed alone, so an
    interrupted recording resumes.
    """
    domain, task, folder = recording.domain, recording.task, recording.folder
    limit = MAX_ATTEMPTS * wanted
    attempted = 0
    env_steps = 0
    while attempted < limit:
        make_folder(folder)  # also if nothing succeeds: every run has the same folders
        have = {k for k in episode_ids(folder) if k >= first}
        successes = len([k for k in have if k < first + attempted])
        if successes >= wanted:
            break
        fresh = range(first + attempted, first + min(attempted + wanted - successes, limit))
        attempted += len(fresh)
        for k in have.intersection(fresh):  # recorded before an interruption
            handle, _ = open_episode(folder / f"{k:06d}.safetensors")
            env_steps += handle.get_slice("reward").get_shape()[0]
        seeds = [ONLINE_SEED + k for k in fresh if k not in have]
        for episode in run_episodes(
            vla, domain, {task: seeds}, recording.num_envs, recording.act, keep_images=True
        ):
            env_steps += episode["env_steps"]
            if episode["success"]:
                write_success(episode, recording)
    return len([k for k in episode_ids(folder) if k >= first]), attempted, env_steps


def write_success(episode: dict, recording: OnlineRecording) -> None:
    """Write one successful episode of `run_episodes` into D_rl."""
    domain = recording.domain
    info = EpisodeInfo(
        domain=domain.NAME,
        task=recording.task,
        instruction=domain.INSTRUCTIONS[recording.task],
        source="online",
        seed=episode["seed"],
        protocol=domain.PROTOCOL,
        executed=recording.executed,
    )
    path = recording.folder / f"{episode['seed'] - ONLINE_SEED:06d}.safetensors"
    write_episode(path, episode["image"], episode["action"], episode["reward"], info)
