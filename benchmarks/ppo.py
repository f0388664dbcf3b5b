"""PPO's update of the head on stored latents beside Stable-Baselines3's, in samples a second.

Both sides: the same latents of random numbers, the same token learner and two hidden layers of 256 for actor and for
critic, the same minibatches, epochs, clip, Adam. Ours is `ppo_update` of stage_rl.py; theirs is PPO.train() on a filled
RolloutBuffer, so neither side has simulators. Ours keeps latents in bfloat16, theirs in float32. Theirs runs twice:
with our token learner, and with the same function written with torch's MultiheadAttention, as one would. They take
turns; medians. Writes results/benchmarks/ppo.json. Needs `pip install stable-baselines3`.

python benchmarks/ppo.py
python benchmarks/ppo.py --tokens 36 --dim 2560 --decisions 256 --minibatch 64          the paper's latents
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.logger import Logger  # noqa: E402

import stage_rl  # noqa: E402
from benchmarks._turns import in_turns, keep, row  # noqa: E402
from benchmarks.sacfd import Policy, Still, their_net  # noqa: E402  a VLA's head, and the same net for Stable-Baselines3
from model import Head, TokenLearner  # noqa: E402


class Stock(TokenLearner):
    """The token learner by torch's own attention (that both are one function, tests/test_model.py shows)."""

    def __init__(self, dim, heads=4):
        super().__init__(dim, heads)
        self.attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
        del self.q, self.k, self.v, self.o

    def forward(self, h, mask):
        seed = self.seed.expand(len(h), 1, -1)
        x = self.norm_att(self.seed + self.attention(seed, h, h, key_padding_mask=~mask, need_weights=False)[0][:, 0])
        return self.norm_out(x + self.ff(x))


def our_update(args, h, action, logp, advantage, target):
    """A function that does one update as stage 1 does."""
    settings = stage_rl.Args(
        task="", parent="", out="", epochs=args.epochs, minibatch=args.minibatch, target_kl=float("inf")
    )
    policy, critic = Policy(args.dim, args.action_dim), Head(args.dim, 1)
    optimizer = torch.optim.Adam(
        [{"params": list(policy.parameters())}, {"params": list(critic.parameters())}], lr=1e-5, eps=1e-5, fused=True
    )
    flat = {"h": h.bfloat16(), "action": action, "logp": logp, "advantage": advantage, "target": target}
    rows, mask, generator = torch.arange(len(h)), torch.ones(1, args.tokens, dtype=torch.bool), torch.Generator()
    return lambda: stage_rl.ppo_update(settings, policy, critic, optimizer, flat, rows, mask, False, generator, None)


def their_update(learner, args, h, action, logp, advantage, target):
    """The same by Stable-Baselines3, whose rollout is put in place."""
    ppo = PPO(
        "MlpPolicy", Still(args.tokens * args.dim, args.action_dim), n_steps=args.decisions, device="cpu",
        batch_size=args.minibatch, n_epochs=args.epochs, learning_rate=1e-5, ent_coef=0.0, vf_coef=1.0,
        policy_kwargs=their_net(args.tokens, learner) | {"share_features_extractor": False},
    )  # fmt: skip
    ppo.set_logger(Logger(folder=None, output_formats=[]))
    buffer = ppo.rollout_buffer
    for there, here in (
        (buffer.observations, h), (buffer.actions, action), (buffer.log_probs, logp), (buffer.advantages, advantage),
        (buffer.returns, target),
    ):  # fmt: skip
        there[:] = here.numpy().reshape(there.shape)
    buffer.pos, buffer.full = args.decisions, True
    return ppo.train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12, help="M")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--action-dim", type=int, default=4, help="A")
    parser.add_argument("--decisions", type=int, default=2048, help="of a rollout")
    parser.add_argument("--minibatch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7, help="updates timed on each side")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    n = args.decisions
    rollout = torch.randn(n, args.tokens, args.dim), torch.randn(n, args.action_dim), *torch.randn(3, n)

    sides = {"ours": our_update(args, *rollout)}
    learners = {"torch's attention": Stock, "our token learner": TokenLearner}
    sides |= {name: their_update(learner, args, *rollout) for name, learner in learners.items()}
    speed = {side: n * args.epochs / s for side, s in in_turns(sides, args.rounds).items()}
    ours, size = speed.pop("ours"), f"M {args.tokens}, D {args.dim}, minibatch {args.minibatch}"
    for name, theirs in speed.items():
        keep("ppo", {f"PPO update, samples/s ({size}; theirs with {name})": row(ours, theirs, ours / theirs)})


if __name__ == "__main__":
    main()
