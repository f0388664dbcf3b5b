"""Stage 1 at the paper's size, in seconds a decision, beside the VLM's bare forward pass over one picture a decision.

Ours is `train` of stage_rl.py whole: simulators, each picture through the VLM once, the policy, PPO's epochs on the
latents. Theirs is `VLA.encode` on pictures in memory and nothing else, at the batch size that is fastest. The VLM has
blip2-opt-2.7b's configuration and random weights. They take turns; medians. A simulator's reset costs a picture that is
no decision, so few of them are made. Writes results/benchmarks/rl.json.

python benchmarks/rl.py                            blip2-opt-2.7b's configuration: 7.5 GB of disk, 12 GB of memory
python benchmarks/rl.py --tiny --envs 16 --rollout 128
"""

import argparse
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_full_size import build  # noqa: E402  writes blip2-opt-2.7b's configuration with random weights

import stage_rl  # noqa: E402
from benchmarks._turns import in_turns, keep, row  # noqa: E402
from domains import load_domain  # noqa: E402
from model import VLA, Head, build_tiny, freeze  # noqa: E402

TASK, SIZE, A = "drawer-open", 64, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny configuration instead of blip2-opt-2.7b's")
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--rollout", type=int, default=4, help="decisions of each simulator in an iteration")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="batch sizes of the bare pass")
    parser.add_argument("--rounds", type=int, default=5, help="iterations timed on each side")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    domain = load_domain("metaworld")
    sentence, n = domain.INSTRUCTIONS[TASK], args.envs * args.rollout

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        build_tiny(f"{folder}/vlm", [sentence], SIZE) if args.tiny else build(f"{folder}/vlm")
        dtype = "float32" if args.tiny else "bfloat16"
        vla = VLA.create(f"{folder}/vlm", [], A, "metaworld", SIZE, 32, "language", dtype, folder)
    freeze(vla.vlm.parameters())
    vla.log_std.data.fill_(np.log(0.25))
    critic, actor = Head(vla.head.mlp[0].in_features, 1), [*vla.phi(), vla.log_std]
    optimizer = torch.optim.Adam(
        [{"params": actor, "lr": 1e-4}, {"params": list(critic.parameters()), "lr": 1e-3}], eps=1e-5, fused=True
    )
    settings = stage_rl.Args(
        task=TASK, parent="", out="", envs=args.envs, rollout=args.rollout, warmup=0, threads=args.threads
    )
    counters, stage = {"iteration": 0, "env_steps": 0, "best": -1.0}, SimpleNamespace(folder="", log=lambda *_, **__: 0)
    run = stage_rl.train(
        settings, 10**9, domain, vla, critic, optimizer, stage, counters, deque(maxlen=100), lambda: 0.0
    )
    images = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)

    @torch.no_grad()
    def bare(batch):
        torch.set_num_threads(args.threads)
        for i in range(0, n, batch):
            vla.encode(images[i : i + batch], [sentence] * len(images[i : i + batch]))
        torch.set_num_threads(1)

    began = time.time()
    next(run)  # the simulators' start
    print(f"the first iteration: {time.time() - began:.0f} s")
    sides = {"ours": lambda: next(run)} | {b: lambda b=b: bare(b) for b in args.batches if b <= n}
    seconds = {side: s / n for side, s in in_turns(sides, args.rounds).items()}
    run.close()
    ours, best = seconds.pop("ours"), min(seconds, key=seconds.get)
    size = "1.2 M weights" if args.tiny else "blip2-opt-2.7b's size"
    what = f"stage 1, s a decision ({size}, {args.envs} simulators; theirs in batches of {best})"
    keep("rl", {what: row(ours, seconds[best], ours / seconds[best])})


if __name__ == "__main__":
    main()
