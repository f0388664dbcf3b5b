"""Compare SFT with transformers' Trainer and PEFT, a user's own way without this project, in samples a second.

    python -m benchmarks.sft                                       a BLIP-2 of 1.2 M weights, LoRA on all linear layers
    python -m benchmarks.sft --full --batch 8 --steps 1            blip2-opt-2.7b's: 7.5 GB of disk, 12 GB of memory

All sides train the same weights in memory: one BLIP-2 of random weights with LoRA, and the action
head. They read frames of the same episodes, with the same batch, precision, AdamW and gradient
clipping. Theirs consists of a map-style data set, HF's image processor and tokenizer in the
collator, BLIP-2's own forward, and Trainer's loop. Ours is a step of stage 0: EpisodeDataset.batch,
the augmentation, `sft_gradient`, the moving average. At the paper's size LoRA is on the language
model, and ours reads cached image tokens, as `--lora-targets language --cache` does (made before
the clock starts).

Theirs runs with torch's fused attention, the default of transformers, and with plain attention.
Plain attention is faster on some CPUs, but not at the paper's size, where it is left out. A turn is
some steps. The sides take turns; the numbers are medians over turns of a turn's median step. Writes
results/benchmarks/sft.json. Trainer needs accelerate, which PEFT installs.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks._episodes import write_noise_episode
from benchmarks._full_size import build_full_size
from benchmarks._turns import ROOT, row, save_rows
from common.augment import augment, draw_augmentation
from common.backbone import build_tiny, pick_dtype
from common.token_cache import use_token_cache
from data import EpisodeDataset
from domains import load_domain
from model import VLA, VLAConfig, set_trainable
from stage0_sft import BatchWorkers, sft_gradient

TASK = "drawer-open"
IMAGE_SIZE = 64
ACTION_DIM = 4


# ----------------------------------------------------------------------------------------------------------------------
# Ours


def our_turn(vla: VLA, data: EpisodeDataset, args: argparse.Namespace) -> Callable:
    """Return a function that trains as stage 0 does and returns the seconds of each step."""
    trained = vla.theta() + vla.phi()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    average = torch.optim.swa_utils.AveragedModel(torch.nn.ParameterList(trained), multi_avg_fn=ema)

    workers = BatchWorkers(torch.get_num_threads(), args.batch, vla)

    def worker_gradient(step: int, k: int) -> tuple:
        rng = np.random.default_rng(step)
        images, instructions, action = data.batch(rng, args.batch, k, workers.num)
        if not args.full:
            drawn = draw_augmentation(args.batch, data.num_views, rng, k, workers.num)
            images = augment(images, drawn)
        return sft_gradient(vla, images, instructions, torch.from_numpy(action), trained)

    def turn() -> list[float]:
        vla.eval()  # Trainer leaves it in training mode
        seconds = []
        for step in range(args.steps):
            began = time.perf_counter()
            _, gradient = workers.mean(functools.partial(worker_gradient, step))
            for p, g in zip(trained, gradient):
                p.grad = g
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            average.update_parameters(torch.nn.ParameterList(trained))
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


# ----------------------------------------------------------------------------------------------------------------------
# Theirs


class Policy(torch.nn.Module):
    """BLIP-2 and LoRA by their own forward, and the head on the last hidden states."""

    def __init__(self, vla: VLA):
        super().__init__()
        self.vlm = vla.vlm
        self.head = vla.head

    def forward(self, pixel_values, input_ids, attention_mask, action) -> dict:
        out = self.vlm(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        h = out.language_model_outputs.hidden_states[-1].float()  # (B, M, D)
        return {"loss": (self.head(h, attention_mask.bool()) - action).square().mean()}


class Frames(torch.utils.data.Dataset):
    """One frame for one index."""

    def __init__(self, data: EpisodeDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple:
        e = self.data.episode[i]
        t = int(self.data.frame[i])
        return self.data.images[e][t], self.data.instructions[e], self.data.actions[e][t]


class Stopwatch(TrainerCallback):
    """Keeps the time at which each step ended."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *_, **__) -> None:
        self.ends = []

    def on_step_end(self, *_, **__) -> None:
        self.ends.append(time.perf_counter())


def their_turn(vla: VLA, data: EpisodeDataset, args: argparse.Namespace, folder: str) -> Callable:
    """Return a function that trains with Trainer and returns the seconds of each step but the first, its set-up."""
    config = vla.blip.config
    stopwatch = Stopwatch()

    def collate(rows: list) -> dict:
        images, texts, action = zip(*rows)
        text = vla.tokenizer(list(texts), padding=True, return_tensors="pt")
        image_tokens = torch.full((len(rows), config.num_query_tokens), config.image_token_index)
        return {
            "pixel_values": vla.image_processor(list(images), return_tensors="pt").pixel_values,
            "input_ids": torch.cat([image_tokens, text.input_ids], 1),
            "attention_mask": torch.cat([torch.ones_like(image_tokens), text.attention_mask], 1),
            "action": torch.from_numpy(np.stack(action)),
        }

    def turn() -> np.ndarray:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-5,
            bf16=vla.config["dtype"] == "bfloat16",
            use_cpu=True,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(Policy(vla), settings, collate, Frames(data), callbacks=[stopwatch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return np.diff(stopwatch.ends)

    return turn


# ----------------------------------------------------------------------------------------------------------------------


def make_vla(full: bool, folder: str) -> VLA:
    """Return a VLA of random weights, of which LoRA and the head are trained."""
    instruction = load_domain("metaworld").INSTRUCTIONS[TASK]
    if full:
        build_full_size(f"{folder}/vlm")
    else:
        build_tiny(f"{folder}/vlm", [instruction], IMAGE_SIZE)
    config = VLAConfig(
        vlm=f"{folder}/vlm",
        domain="metaworld",
        action_dim=ACTION_DIM,
        image_size=IMAGE_SIZE,
        dtype="bfloat16" if full else pick_dtype("tiny")[0],
        lora_targets="language" if full else "all",
    )
    vla = VLA.create(config, [], folder)
    set_trainable(vla.parameters(), False)
    set_trainable(vla.theta() + vla.phi(), True)
    return vla


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="blip2-opt-2.7b's configuration instead of a tiny one"
    )
    parser.add_argument("--batch", type=int, default=64, help="frames per step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns timed on each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    domain = load_domain("metaworld")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        episodes = Path(folder) / TASK
        for k in range(2 if args.full else 20):
            write_noise_episode(
                episodes / f"{k:06d}.safetensors", TASK, seed=k, image_size=IMAGE_SIZE
            )
        our_data = EpisodeDataset({episodes: 1.0}, domain, IMAGE_SIZE)
        their_data = EpisodeDataset({episodes: 1.0}, domain, IMAGE_SIZE)
        vla = make_vla(args.full, folder)
        dtype = vla.config["dtype"]
        if args.full:
            use_token_cache(our_data, vla)
        ours = our_turn(vla, our_data, args)
        theirs = their_turn(vla, their_data, args, f"{folder}/trainer")
        sides = {"ours": (ours, vla.blip.config._attn_implementation), "fused": (theirs, "sdpa")}
        if not args.full:
            sides["plain"] = (theirs, "eager")
        seconds = {side: [] for side in sides}
        for _ in range(args.rounds + 1):
            for side, (turn, attention) in sides.items():
                vla.blip.set_attn_implementation(attention)
                seconds[side].append(np.median(turn()))
    rates = {side: args.batch / float(np.median(times[1:])) for side, times in seconds.items()}
    ours = rates.pop("ours")
    size = "blip2-opt-2.7b's size, ours with --cache" if args.full else "1.2 M weights"
    for attention, theirs in rates.items():
        measurement = f"SFT, samples/s ({size}, {dtype}, batch {args.batch}; theirs with {attention} attention)"
        save_rows("sft", {measurement: row(ours, theirs, ours / theirs)})


if __name__ == "__main__":
    main()
