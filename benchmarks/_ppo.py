"""Stage 1's PPO update on a rollout that is already there, without environments."""

from types import SimpleNamespace

import numpy as np
import torch

import stage_rl
from model import Head


class StoredRollout:
    """The fields of stage_rl.Rollout that its update reads, for latents that are already there.

    h: (T+1, N, M, D) bfloat16. mask: (1, M). Actions come from the policy, rewards are random, and
    no episode ends.
    """

    latents = stage_rl.Rollout.latents

    def __init__(self, vla, h: torch.Tensor, mask: torch.Tensor):
        T = len(h) - 1
        N = h.shape[1]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            action, log_prob = vla.explore(h[:-1].flatten(0, 1).float(), mask, generator)
        self.vla = vla
        self.h = h
        self.mask = mask
        self.images = None  # (T+1, N, H, W, 3) uint8, to encode again
        self.instruction = ""
        self.action = action.view(T, N, -1)
        self.log_prob = log_prob.view(T, N)
        self.reward = torch.rand(T, N, generator=generator)
        self.terminated = torch.zeros(T, N)
        self.truncated = torch.zeros(T, N)
        self.valid = torch.ones(T, N, dtype=torch.bool)


def make_learner(vla, dim: int, lr: float = 1e-5, critic_lr: float = 1e-5) -> SimpleNamespace:
    """Return the fields of rl_learner.Learner that the update reads, with a new critic on latents of width `dim`."""
    critic = Head(dim, 1)
    actor_params = [p for p in vla.parameters() if p.requires_grad]
    critic_params = list(critic.parameters())
    groups = [{"params": actor_params, "lr": lr}, {"params": critic_params, "lr": critic_lr}]
    return SimpleNamespace(
        vla=vla,
        critic=critic,
        actor_params=actor_params,
        critic_params=critic_params,
        optimizer=torch.optim.Adam(groups, eps=1e-5, fused=True),
        stage=SimpleNamespace(folder=""),
    )


def ppo_args(**changes) -> stage_rl.Args:
    """Return stage 1's default arguments with `changes`. No update stops early."""
    return stage_rl.Args(task="", parent="", out="", target_kl=np.inf, **changes)
