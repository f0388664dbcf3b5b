"""Compare PPO's update of the head on stored latents with Stable-Baselines3's, in samples a second.

    python -m benchmarks.ppo
    python -m benchmarks.ppo --tokens 36 --dim 2560 --env-steps 256 --minibatch 64          the paper's latents

Both sides use the same random latents, the same token learner and two hidden layers of 256 for
actor and for critic, and the same minibatches, epochs, clip and Adam. Both compute the critic's
values and the advantages, then run the epochs. Ours is stage_rl.update. Theirs is PPO.train() on a
filled RolloutBuffer, so neither side has environments. Ours keeps latents in bfloat16, theirs in
float32. Theirs runs twice: with our token learner, and with the same function written with torch's
MultiheadAttention, as one would. The sides take turns; the numbers are medians.

Writes results/benchmarks/ppo.json. Needs `pip install stable-baselines3`.
"""

import argparse
from collections.abc import Callable

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

import stage_rl
from benchmarks._ppo import StoredRollout, make_learner, ppo_args
from benchmarks._turns import row, save_rows, take_turns
from benchmarks.sacfd import LatentPolicy, SpacesOnly, sb3_network
from model import TokenLearner

NUM_ENVS = 16


class StockTokenLearner(TokenLearner):
    """The token learner with torch's own attention. tests/test_model.py shows that both are the same function."""

    def __init__(self, dim: int, heads: int = 4):
        super().__init__(dim, heads)
        self.attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
        del self.q, self.k, self.v, self.o

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seed = self.seed.expand(len(h), 1, -1)
        attended, _ = self.attention(seed, h, h, key_padding_mask=~mask, need_weights=False)
        x = self.norm_att(self.seed + attended[:, 0])
        return self.norm_out(x + self.ff(x))


def our_update(args: argparse.Namespace, h: torch.Tensor) -> Callable:
    """Return a function that runs one update as stage 1 does. h: (T+1, N, M, D) float32."""
    settings = ppo_args(epochs=args.epochs, minibatch=args.minibatch)
    policy = LatentPolicy(args.dim, args.action_dim)
    mask = torch.ones(1, args.tokens, dtype=torch.bool)
    rollout = StoredRollout(policy, h.bfloat16(), mask)
    learner = make_learner(policy, args.dim)
    generator = torch.Generator().manual_seed(0)
    return lambda: stage_rl.update(settings, learner, rollout, False, generator)


def their_update(learner: type, args: argparse.Namespace, h: torch.Tensor) -> Callable:
    """Return a function that does the same by Stable-Baselines3."""
    T = len(h) - 1
    env = SpacesOnly(args.tokens * args.dim, args.action_dim)
    ppo = PPO(
        "MlpPolicy",
        env,
        n_steps=T * NUM_ENVS,
        batch_size=args.minibatch,
        n_epochs=args.epochs,
        learning_rate=1e-5,
        ent_coef=0.0,
        vf_coef=1.0,
        device="cpu",
        policy_kwargs=sb3_network(args.tokens, learner) | {"share_features_extractor": False},
    )
    ppo.set_logger(Logger(folder=None, output_formats=[]))
    observations = h[:-1].flatten(0, 1).flatten(1)  # (T * N, M * D)
    buffer = ppo.rollout_buffer
    with torch.no_grad():
        actions, _, log_probs = ppo.policy(observations[:1])
    buffer.observations[:] = observations[:, None].numpy()
    buffer.actions[:] = torch.randn(buffer.actions.shape).numpy() * actions.std().item()
    buffer.log_probs[:] = log_probs.item()
    buffer.rewards[:] = torch.rand(buffer.rewards.shape).numpy()

    def update():
        with torch.no_grad():
            values = torch.cat(
                [ppo.policy.predict_values(x) for x in observations.split(args.minibatch)]
            )
        buffer.values[:] = values.numpy().reshape(buffer.values.shape)
        buffer.pos = T * NUM_ENVS
        buffer.full = True
        buffer.compute_returns_and_advantage(values[-1:, 0], torch.zeros(1).numpy())
        ppo.train()

    return update


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=12, help="latents per image, M")
    parser.add_argument("--dim", type=int, default=128, help="width of the latents, D")
    parser.add_argument("--action-dim", type=int, default=4, help="action dimensions, A")
    parser.add_argument(
        "--env-steps", type=int, default=2048, help=f"a rollout's steps, a multiple of {NUM_ENVS}"
    )
    parser.add_argument(
        "--minibatch", type=int, default=512, help="environment steps per gradient step"
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over a rollout")
    parser.add_argument("--rounds", type=int, default=7, help="updates timed on each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    T = args.env_steps // NUM_ENVS
    h = torch.randn(T + 1, NUM_ENVS, args.tokens, args.dim)

    sides = {"ours": our_update(args, h)}
    for name, learner in {
        "torch's attention": StockTokenLearner,
        "our token learner": TokenLearner,
    }.items():
        sides[name] = their_update(learner, args, h)
    samples = T * NUM_ENVS * args.epochs
    speed = {side: samples / seconds for side, seconds in take_turns(sides, args.rounds).items()}
    ours = speed.pop("ours")
    size = f"M {args.tokens}, D {args.dim}, minibatch {args.minibatch}"
    for name, theirs in speed.items():
        measurement = f"PPO update, samples/s ({size}; theirs with {name})"
        save_rows("ppo", {measurement: row(ours, theirs, ours / theirs)})


if __name__ == "__main__":
    main()
