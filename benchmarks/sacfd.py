"""Compare SACfD's time per environment step with Stable-Baselines3's SAC on the same latents.

    python -m benchmarks.sacfd

Neither side has environments or a VLM. Both use latents of one size, a token learner and two hidden
layers of 256 for the actor, the same for two critics that share a token learner, and the same
batch, gradient steps per environment step and buffer. An environment step is: act, store, train.
"as set" also rests the actor every other gradient step, as `stage_rl.py --algo sacfd` does. "every
step" does not, as in SB3. The sides take turns; the numbers are medians.

Writes results/benchmarks/sacfd.json. Needs `pip install stable-baselines3`.
"""

import argparse
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

import sacfd
import stage_rl
from benchmarks._turns import row, save_rows, take_turns
from model import Head, TokenLearner, log_prob

ROWS = 5000  # rows in the buffers


class LatentPolicy(torch.nn.Module):
    """The parts of a VLA that RL in latent space uses."""

    def __init__(self, dim: int, action_dim: int):
        super().__init__()
        self.head = Head(dim, action_dim)
        self.log_std = torch.nn.Parameter(torch.full((action_dim,), -1.4))
        self.register_buffer("action_std", torch.ones(action_dim))

    def mean(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(h, mask)

    def explore(self, h: torch.Tensor, mask: torch.Tensor, generator: torch.Generator):
        mean = self.mean(h, mask)
        action = mean + self.log_std.exp() * torch.randn(mean.shape, generator=generator)
        return action, log_prob(action, mean, self.log_std)


class Pooled(BaseFeaturesExtractor):
    """The same token learner for SB3, whose observations are flat."""

    def __init__(self, space: gym.spaces.Box, tokens: int, learner: type):
        dim = space.shape[0] // tokens
        super().__init__(space, dim)
        self.tokens = tokens
        self.learner = learner(dim)
        self.mask = torch.ones(1, tokens, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.unflatten(1, (self.tokens, -1))
        return self.learner(h, self.mask.expand(len(h), -1))


def sb3_network(tokens: int, learner: type = TokenLearner) -> dict:
    """Return Stable-Baselines3's settings for the head's shape."""
    return {
        "features_extractor_class": Pooled,
        "features_extractor_kwargs": {"tokens": tokens, "learner": learner},
        "net_arch": [256, 256],
        "activation_fn": torch.nn.GELU,
    }


class SpacesOnly(gym.Env):
    """An environment that has spaces and no dynamics."""

    def __init__(self, size: int, action_dim: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)


class Ours:
    """SACfD on full buffers of random latents."""

    def __init__(self, settings: stage_rl.Args, latents: np.ndarray, actions: np.ndarray):
        M, D = latents.shape[1:]
        A = actions.shape[1]
        how = settings.sacfd
        self.settings = settings
        self.latents = torch.from_numpy(latents)
        self.actions = torch.from_numpy(actions)
        self.mask = torch.ones(1, M, dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(0)
        self.vla = LatentPolicy(D, A)
        critics = sacfd.SACCritics(D, A, how.alpha)
        actor_params = list(self.vla.parameters())
        critic_params = [p for p in critics.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam([*actor_params, *critic_params], fused=True)
        stage = SimpleNamespace(folder="")
        self.learner = SimpleNamespace(
            vla=self.vla,
            critic=critics,
            optimizer=optimizer,
            actor_params=actor_params,
            stage=stage,
        )
        device = torch.device("cpu")
        self.demos = sacfd.Replay(2 * ROWS, 1, (M, D), A, device)
        self.replay = sacfd.Replay(2 * ROWS, 1, (M, D), A, device)
        for t in range(ROWS):
            for buffer in (self.demos, self.replay):
                buffer.h[t] = self.latents[t]
                self.store(buffer, t)

    def store(self, buffer: sacfd.Replay, t: int) -> None:
        nothing = torch.zeros(1)
        h_next = self.latents[t + 1][None]
        buffer.add(self.actions[t : t + 1], nothing, nothing, nothing, torch.ones(1), h_next)

    def env_step(self, t: int, actor_every: int) -> None:
        """Act, store and train."""
        with torch.no_grad():
            h = self.replay.h[t % ROWS][:1].float()
            mean = self.vla.mean(h, self.mask)
            noise = torch.randn(mean.shape, generator=self.generator)
            sacfd.tanh_gaussian(mean, self.vla.log_std, noise)
        self.replay.t = ROWS  # keeps the buffer as large as theirs
        self.store(self.replay, t % ROWS)
        buffers = (self.demos, self.replay)
        for step in range(round(self.settings.sacfd.utd)):
            trains_actor = step % actor_every == 0
            sacfd.sacfd_step(
                self.settings, self.learner, buffers, self.mask, trains_actor, self.generator
            )


class Theirs:
    """Stable-Baselines3's SAC on the same rows."""

    def __init__(self, settings: stage_rl.Args, latents: np.ndarray, actions: np.ndarray):
        M, D = latents.shape[1:]
        self.how = settings.sacfd
        self.flat = latents.reshape(len(latents), -1)
        self.actions = actions
        env = SpacesOnly(M * D, actions.shape[1])
        network = sb3_network(M)
        self.sac = SAC(
            "MlpPolicy",
            env,
            batch_size=self.how.batch,
            buffer_size=2 * ROWS,
            device="cpu",
            policy_kwargs=network,
        )
        self.sac.set_logger(Logger(folder=None, output_formats=[]))
        for t in range(ROWS):
            self.store(t)

    def store(self, t: int) -> None:
        nothing = np.zeros(1)
        now = self.flat[t : t + 1]
        after = self.flat[t + 1 : t + 2]
        self.sac.replay_buffer.add(now, after, self.actions[t : t + 1], nothing, nothing, [{}])

    def env_step(self, t: int) -> None:
        """Act, store and train."""
        self.sac.predict(self.flat[t % ROWS][None], deterministic=False)
        self.store(t % ROWS)
        self.sac.train(gradient_steps=round(self.how.utd), batch_size=self.how.batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16, help="latents per image, M")
    parser.add_argument("--dim", type=int, default=128, help="width of the latents, D")
    parser.add_argument("--action-dim", type=int, default=7, help="action dimensions, A")
    parser.add_argument(
        "--env-steps", type=int, default=20, help="environment steps timed in a turn"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = stage_rl.Args(task="", parent="", out="")
    latents = (
        np.random.default_rng(0).normal(size=(ROWS + 1, args.tokens, args.dim)).astype(np.float32)
    )
    actions = np.random.default_rng(1).uniform(-1, 1, (ROWS, args.action_dim)).astype(np.float32)
    ours = Ours(settings, latents, actions)
    theirs = Theirs(settings, latents, actions)
    sides = {
        "as set": lambda t: ours.env_step(t, settings.sacfd.actor_every),
        "every step": lambda t: ours.env_step(t, 1),
        "theirs": theirs.env_step,
    }

    def turn(env_step: Callable) -> Callable:
        """Return a function that runs some environment steps, each time the next ones."""
        clock = itertools.count()
        return lambda: [env_step(next(clock)) for _ in range(args.env_steps)]

    seconds = take_turns({side: turn(env_step) for side, env_step in sides.items()}, args.rounds)
    ms = {side: 1000 * s / args.env_steps for side, s in seconds.items()}
    for side in ("as set", "every step"):
        measurement = f"SACfD, ms per environment step ({side})"
        save_rows("sacfd", {measurement: row(ms[side], ms["theirs"], ms["theirs"] / ms[side])})


if __name__ == "__main__":
    main()
