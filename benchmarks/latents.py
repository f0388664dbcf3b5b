"""Compare PPO's update on stored latents with one that encodes the images again.

    python -m benchmarks.latents --checkpoint runs/metaworld-seed0/0-sft

Both sides run the same minibatches of head and critic on the same images of an expert task.
"theirs" encodes a minibatch's images each time it is visited, as PPO through the VLM has to. The
sides take turns; the numbers are medians. Writes results/benchmarks/latents.json.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

import stage_rl
from benchmarks._ppo import StoredRollout, make_learner, ppo_args
from benchmarks._turns import row, save_rows, take_turns
from common.errors import run_cli
from data import EpisodeDataset
from domains import load_domain
from model import VLA, set_trainable

NUM_ENVS = 16


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    vla = VLA.load(args.checkpoint)
    set_trainable(vla.vlm.parameters(), False)
    domain = load_domain(vla.config["domain"])
    task = domain.EXPERT_TASKS[0]
    folder = Path(args.data) / domain.NAME / task
    data = EpisodeDataset({folder: 1.0}, domain, vla.config["image_size"])
    T = args.env_steps // NUM_ENVS
    images, _, _ = data.batch(np.random.default_rng(0), (T + 1) * NUM_ENVS)
    instruction = domain.INSTRUCTIONS[task]

    encoded = []
    with torch.no_grad():
        for begin in range(0, len(images), 64):
            h, mask = vla.encode(
                images[begin : begin + 64], [instruction] * len(images[begin : begin + 64])
            )
            encoded.append(h.bfloat16())
    h = torch.cat(encoded).unflatten(0, (T + 1, NUM_ENVS))
    rollout = StoredRollout(vla, h, mask[:1])
    rollout.images = images.reshape(T + 1, NUM_ENVS, *images.shape[1:])
    rollout.instruction = instruction
    learner = make_learner(vla, h.shape[-1])
    generator = torch.Generator().manual_seed(0)

    def update(train_vlm: bool) -> None:
        settings = ppo_args(epochs=args.epochs, minibatch=args.minibatch, train_vlm=train_vlm)
        stage_rl.update(settings, learner, rollout, False, generator)

    sides = {"ours": partial(update, False), "theirs": partial(update, True)}
    seconds = take_turns(sides, args.rounds)
    measurement = (
        f"PPO update, {args.epochs} epochs over {T * NUM_ENVS} steps, seconds; theirs encodes again"
    )
    ratio = seconds["theirs"] / seconds["ours"]
    save_rows("latents", {measurement: row(seconds["ours"], seconds["theirs"], ratio)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder")
    parser.add_argument("--data", default="runs/D_e", help="folder of the expert episodes")
    parser.add_argument(
        "--env-steps", type=int, default=2048, help=f"a rollout's steps, a multiple of {NUM_ENVS}"
    )
    parser.add_argument(
        "--minibatch", type=int, default=512, help="environment steps per gradient step"
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over a rollout")
    parser.add_argument("--rounds", type=int, default=5, help="updates timed on each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    run_cli(main, parser.parse_args())
