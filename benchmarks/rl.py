"""Compare stage 1 at the paper's size with the VLM's bare forward pass, in seconds per environment step.

    python -m benchmarks.rl                            blip2-opt-2.7b's configuration: 7.5 GB of disk, 12 GB of memory
    python -m benchmarks.rl --tiny --envs 16 --rollout 128

Ours is an iteration of stage_rl.py: environments, each image through the VLM once, the policy,
PPO's epochs on the latents. Theirs is `VLA.encode` on one image per environment step from memory
and nothing else, at the fastest batch size. The VLM has blip2-opt-2.7b's configuration and random
weights. The sides take turns; the numbers are medians. An environment's reset costs an image
without an environment step, so only few environments are made.

Writes results/benchmarks/rl.json.
"""

import argparse
import tempfile
import time
from functools import partial

import numpy as np
import torch

import stage_rl
from benchmarks._full_size import build_full_size
from benchmarks._ppo import make_learner
from benchmarks._turns import ROOT, row, save_rows, take_turns
from common.backbone import build_tiny
from common.devices import cpu_threads
from common.errors import run_cli
from domains import load_domain
from model import VLA, VLAConfig, set_trainable

TASK = "drawer-open"
IMAGE_SIZE = 64
ACTION_DIM = 4


def make_vla(tiny: bool, instruction: str) -> VLA:
    """Return a VLA with random weights of which only the head is trained."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        if tiny:
            build_tiny(f"{folder}/vlm", [instruction], IMAGE_SIZE)
        else:
            build_full_size(f"{folder}/vlm")
        config = VLAConfig(
            vlm=f"{folder}/vlm",
            domain="metaworld",
            action_dim=ACTION_DIM,
            image_size=IMAGE_SIZE,
            dtype="float32" if tiny else "bfloat16",
            lora_targets="language",
        )
        vla = VLA.create(config, [], folder)
    set_trainable(vla.vlm.parameters(), False)
    vla.log_std.data.fill_(np.log(0.25))
    return vla


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    domain = load_domain("metaworld")
    instruction = domain.INSTRUCTIONS[TASK]
    n = args.envs * args.rollout
    vla = make_vla(args.tiny, instruction)
    learner = make_learner(vla, vla.head.mlp[0].in_features, lr=1e-4, critic_lr=1e-3)
    settings = stage_rl.Args(
        task=TASK,
        parent="",
        out="",
        envs=args.envs,
        rollout=args.rollout,
        threads=args.threads,
        warmup=0,
    )
    generator = torch.Generator().manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    @torch.no_grad()
    def encode_all(batch: int) -> None:
        with cpu_threads(args.threads):
            for begin in range(0, n, batch):
                part = images[begin : begin + batch]
                vla.encode(part, [instruction] * len(part))

    began = time.time()
    rollout = stage_rl.Rollout(settings, vla, domain, 0)
    print(f"start of the environments: {time.time() - began:.0f} s")

    def iteration() -> None:
        with cpu_threads(rollout.threads):
            rollout.collect(generator)
        with cpu_threads(args.threads):
            stage_rl.update(settings, learner, rollout, False, generator)

    sides = {"ours": iteration}
    for batch in args.batches:
        if batch <= n:
            sides[batch] = partial(encode_all, batch)
    seconds = {side: s / n for side, s in take_turns(sides, args.rounds).items()}
    rollout.close()
    ours = seconds.pop("ours")
    best = min(seconds, key=seconds.get)
    size = "1.2 M weights" if args.tiny else "blip2-opt-2.7b's size"
    measurement = f"stage 1, s per environment step ({size}, {args.envs} environments; theirs in batches of {best})"
    save_rows("rl", {measurement: row(ours, seconds[best], ours / seconds[best])})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="the tiny configuration instead of blip2-opt-2.7b's"
    )
    parser.add_argument("--envs", type=int, default=4, help="environments, a process each")
    parser.add_argument(
        "--rollout", type=int, default=4, help="steps of each environment in an iteration"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4], help="batch sizes of the bare pass"
    )
    parser.add_argument("--rounds", type=int, default=5, help="iterations timed on each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    run_cli(main, parser.parse_args())
