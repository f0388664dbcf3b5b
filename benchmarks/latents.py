"""What keeping the latents is worth: PPO's update on stored h beside one that encodes the pictures again.

Both sides do the same minibatches of head and critic on the same pictures of an expert task; "theirs" encodes a
minibatch's pictures each time it is visited, as PPO through the VLM has to. They take turns; medians. Writes
results/benchmarks/latents.json.

python benchmarks/latents.py --checkpoint runs/metaworld-seed0/0-sft
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import stage_rl  # noqa: E402
from benchmarks._turns import in_turns, keep, row  # noqa: E402
from data import Episodes  # noqa: E402
from domains import load_domain  # noqa: E402
from model import VLA, Head  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder")
    parser.add_argument("--data", default="runs/D_e", help="where the expert episodes are")
    parser.add_argument("--decisions", type=int, default=2048, help="decisions of a rollout")
    parser.add_argument("--minibatch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="updates timed on each side")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    vla = VLA.load(args.checkpoint)
    domain = load_domain(vla.config["domain"])
    task = domain.EXPERT_TASKS[0]
    data = Episodes({Path(args.data) / vla.config["domain"] / task: 1.0}, domain, vla.config["image_size"])
    images, sentences, _ = data.batch(np.random.default_rng(0), args.decisions)
    critic = Head(vla.head.mlp[0].in_features, 1)
    optimizer = torch.optim.Adam(
        [{"params": [*vla.phi(), vla.log_std]}, {"params": list(critic.parameters())}], lr=1e-5, eps=1e-5, fused=True
    )

    @torch.no_grad()
    def encode(b):
        h, mask = vla.encode(images[b], [sentences[0]] * len(b))
        return h.to(torch.bfloat16), mask[:1]

    h, mask = (torch.cat(x) for x in zip(*[encode(b) for b in np.arange(args.decisions).reshape(-1, 64)]))
    mask = mask[:1]
    advantage, target = torch.randn(args.decisions), torch.randn(args.decisions)
    with torch.no_grad():
        action, logp = vla.explore(h.float(), mask, torch.Generator().manual_seed(0))

    settings = stage_rl.Args(
        task="", parent="", out="", epochs=args.epochs, minibatch=args.minibatch, target_kl=float("inf")
    )
    flat = {"h": h, "action": action, "logp": logp, "advantage": advantage, "target": target}
    rows, generator = torch.arange(args.decisions), torch.Generator()

    def update(again=None):
        stage_rl.ppo_update(settings, vla, critic, optimizer, flat, rows, mask, False, generator, None, again)

    sides = {"ours": update, "theirs": lambda: update(lambda b: encode(b.numpy())[0])}
    ours, theirs = in_turns(sides, args.rounds).values()
    what = f"PPO update, {args.epochs} epochs over {args.decisions} decisions, seconds; theirs encodes again"
    keep("latents", {what: row(ours, theirs, theirs / ours)})


if __name__ == "__main__":
    main()
