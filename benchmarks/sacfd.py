"""SACfD's own time for a decision, without simulator and VLM, beside Stable-Baselines3's SAC on the same latents.

Both sides: latents of one size, a token learner and two hidden layers of 256 for the actor, the same for two critics
that share a token learner, the same batch, gradient steps for each decision and buffer; act, store, train. "as set"
also rests the actor every other gradient step, as `stage_rl.py --algo sacfd` does; "every step" does not, as SB3.
They take turns; medians. Writes results/benchmarks/sacfd.json. Needs `pip install stable-baselines3`.

python benchmarks/sacfd.py
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from stable_baselines3 import SAC  # noqa: E402
from stable_baselines3.common.logger import Logger  # noqa: E402
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402

import sacfd  # noqa: E402
import stage_rl  # noqa: E402
from benchmarks._turns import in_turns, keep, row  # noqa: E402
from model import Head, TokenLearner  # noqa: E402


class Policy(torch.nn.Module):
    """The parts of a VLA that SACfD touches."""

    def __init__(self, dim, action_dim):
        super().__init__()
        self.head, self.log_std = Head(dim, action_dim), torch.nn.Parameter(torch.full((action_dim,), -1.4))
        self.register_buffer("action_std", torch.ones(action_dim))

    def mean(self, h, mask):
        return self.head(h, mask)


class Pooled(BaseFeaturesExtractor):
    """The same token learner for SB3, whose observations are flat."""

    def __init__(self, space, tokens, learner):
        super().__init__(space, space.shape[0] // tokens)
        self.tokens, self.learner = tokens, learner(space.shape[0] // tokens)
        self.mask = torch.ones(1, tokens, dtype=torch.bool)

    def forward(self, x):
        h = x.unflatten(1, (self.tokens, -1))
        return self.learner(h, self.mask.expand(len(h), -1))


def their_net(tokens, learner=TokenLearner):
    """Stable-Baselines3's settings for the head's shape."""
    return dict(
        features_extractor_class=Pooled, features_extractor_kwargs=dict(tokens=tokens, learner=learner),
        net_arch=[256, 256], activation_fn=torch.nn.GELU,
    )  # fmt: skip


class Still(gym.Env):
    """Spaces without a world."""

    def __init__(self, size, action_dim):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="M")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--action-dim", type=int, default=7, help="A")
    parser.add_argument("--decisions", type=int, default=20, help="decisions timed in a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    M, D, A = args.tokens, args.dim, args.action_dim
    how, rows = sacfd.SACfD(), 5000
    settings = stage_rl.Args(task="", parent="", out="", sacfd=how)

    vla, critics, mask = Policy(D, A), sacfd.Critics(D, A, how.alpha), torch.ones(1, M, dtype=torch.bool)
    optimizer = torch.optim.Adam([*vla.parameters(), *(p for p in critics.parameters() if p.requires_grad)], fused=True)
    generator, demos, replay = (
        torch.Generator().manual_seed(0),
        *(sacfd.Replay(2 * rows, 1, M, D, A, "cpu") for _ in "12"),
    )
    theirs = SAC(
        "MlpPolicy", Still(M * D, A), batch_size=how.batch, buffer_size=2 * rows, device="cpu",
        policy_kwargs=their_net(M),
    )  # fmt: skip
    theirs.set_logger(Logger(folder=None, output_formats=[]))
    latents = np.random.default_rng(0).normal(size=(rows + 1, M, D)).astype(np.float32)
    actions = np.random.default_rng(1).uniform(-1, 1, (rows, A)).astype(np.float32)

    def store(t):
        """One row on both sides' buffers, of what this side would have seen."""
        zero = torch.zeros(1)
        return (
            torch.from_numpy(actions[t : t + 1]),
            zero,
            zero,
            zero,
            torch.ones(1),
            torch.from_numpy(latents[t + 1][None]),
        )

    for t in range(rows):
        for buffer in (demos, replay):
            buffer.h[t] = torch.from_numpy(latents[t])
            buffer.add(*store(t))
        theirs.replay_buffer.add(
            latents[t].reshape(1, -1), latents[t + 1].reshape(1, -1), actions[t : t + 1], np.zeros(1), np.zeros(1), [{}]
        )
    steps = round(how.utd)

    def our_decision(t, actor_every):
        with torch.no_grad():
            h = replay.h[t % rows][:1].float()
            sacfd.squashed(vla.mean(h, mask), vla.log_std, torch.randn(1, A, generator=generator))
        replay.t = rows  # so that the buffer stays as large as theirs
        replay.add(*store(t % rows))
        for step in range(steps):
            moves = step % actor_every == 0
            sacfd.update(
                settings, vla, critics, optimizer, [*vla.parameters()], mask, demos, replay, moves, generator, None
            )

    def their_decision(t):
        x = latents[t % rows].reshape(1, -1)
        theirs.predict(x, deterministic=False)
        theirs.replay_buffer.add(x, x, actions[:1], np.zeros(1), np.zeros(1), [{}])
        theirs.train(gradient_steps=steps, batch_size=how.batch)

    sides = {
        "ours, as set": lambda t: our_decision(t, how.actor_every),
        "ours, every step": lambda t: our_decision(t, 1),
        "theirs": their_decision,
    }

    def turn(decision):
        """Some decisions of a side, each turn's after the last one's."""
        clock = itertools.count()
        return lambda: [decision(next(clock)) for _ in range(args.decisions)]

    seconds = in_turns({side: turn(decision) for side, decision in sides.items()}, args.rounds)
    ms = {side: 1000 * s / args.decisions for side, s in seconds.items()}
    for side in ("ours, as set", "ours, every step"):
        what = f"SACfD, ms a decision ({side[6:]})"
        keep("sacfd", {what: row(ms[side], ms["theirs"], ms["theirs"] / ms[side])})


if __name__ == "__main__":
    main()
