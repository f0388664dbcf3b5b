"""SFT in samples a second beside transformers' Trainer with PEFT, what a user would write without this project.

All sides train the same weights in memory, one BLIP-2 of random weights with LoRA and the action head, on the frames of
the same episode files, with the same batch, arithmetic, AdamW and clipping. Theirs is a map-style data set, HF's image
processor and tokenizer in the collator, BLIP-2's own forward, and Trainer's loop. Ours is what stage 0 does in a step:
data.Episodes.batch, the augmentation, `sft_gradient`, the moving average. At the paper's size LoRA is on the language
model, and ours has the image tokens cached, as `--lora-targets language --cache` does (made before the clock starts).
Theirs runs with torch's fused attention, which transformers takes by itself, and with plain attention, which is faster
on some CPUs (not at the paper's size, where it is left out). A turn is some steps; they take turns; medians over turns
of a turn's median step. Writes results/benchmarks/sft.json. Trainer needs accelerate, which PEFT installs.

python benchmarks/sft.py                           a BLIP-2 of 1.2 M weights, LoRA on all linear layers
python benchmarks/sft.py --full --batch 8 --steps 1          blip2-opt-2.7b's: 7.5 GB of disk, 12 GB of memory
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_full_size import build  # noqa: E402  writes blip2-opt-2.7b's configuration with random weights
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from benchmarks._turns import keep, row  # noqa: E402
from data import Episodes, write_episode  # noqa: E402
from domains import metaworld as domain  # noqa: E402
from model import VLA, build_tiny, cast_once, freeze, pick_dtype  # noqa: E402
from stage0_sft import augment, draw_augmentation, sft_gradient  # noqa: E402

TASK, SIZE, A = "drawer-open", 64, 4


def frames(folder, episodes=20, length=40):
    """Episodes of noise in the project's format."""
    rng = np.random.default_rng(0)
    for k in range(episodes):
        write_episode(
            Path(folder) / f"{k:06d}.safetensors", rng.integers(0, 256, (length, SIZE, SIZE, 3)),
            rng.uniform(-1, 1, (length, A)), np.zeros(length), domain="metaworld", task=TASK,
            instruction=domain.INSTRUCTIONS[TASK], source="expert", seed=k, protocol=domain.PROTOCOL,
        )  # fmt: skip
    return Episodes({folder: 1.0}, domain, SIZE)


def our_turn(vla, data, args):
    """A function that trains as stage 0 does: a turn's seconds, step by step."""
    trained = vla.theta() + vla.phi()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        torch.nn.ParameterList(trained), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )

    def turn():
        vla.eval()  # Trainer leaves it in train mode
        seconds = []
        for step in range(args.steps):
            began, rng = time.perf_counter(), np.random.default_rng(step)
            images, instructions, action = data.batch(rng, args.batch)
            if not args.full:
                images = augment(images, draw_augmentation(args.batch, domain.VIEWS, rng))
            optimizer.zero_grad()
            sft_gradient(vla, images, instructions, torch.from_numpy(action), vla.action_std)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            average.update_parameters(torch.nn.ParameterList(trained))
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


class Policy(torch.nn.Module):
    """Theirs: BLIP-2 and LoRA by their own forward, and the head on the last hidden states."""

    def __init__(self, vla):
        super().__init__()
        self.vlm, self.head = vla.vlm, vla.head

    def forward(self, pixel_values, input_ids, attention_mask, action):
        out = self.vlm(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True,
            use_cache=False,
        )  # fmt: skip
        h = out.language_model_outputs.hidden_states[-1].float()  # (B, M, D)
        return {"loss": (self.head(h, attention_mask.bool()) - action).square().mean()}


class Frames(torch.utils.data.Dataset):
    """Theirs: one frame for one index."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        e, t = self.data.episode[i], int(self.data.frame[i])
        return self.data.images[e][t], self.data.instructions[e], self.data.actions[e][t]


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_train_begin(self, *_, **__):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def their_turn(vla, data, args, folder):
    """The same by Trainer; the first step, which has its setting up in it, does not count."""
    config, stopwatch = vla.blip.config, Stopwatch()

    def collate(rows):
        images, texts, action = zip(*rows)
        text = vla.tokenizer(list(texts), padding=True, return_tensors="pt")
        place = torch.full((len(rows), config.num_query_tokens), config.image_token_index)
        return {
            "pixel_values": vla.image_processor(list(images), return_tensors="pt").pixel_values,
            "input_ids": torch.cat([place, text.input_ids], 1),
            "attention_mask": torch.cat([torch.ones_like(place), text.attention_mask], 1),
            "action": torch.from_numpy(np.stack(action)),
        }

    def turn():
        settings = TrainingArguments(
            output_dir=folder, max_steps=args.steps + 1, per_device_train_batch_size=args.batch, learning_rate=1e-5,
            bf16=vla.config["dtype"] == "bfloat16", use_cpu=True, max_grad_norm=1.0, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(Policy(vla), settings, collate, Frames(data), callbacks=[stopwatch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return np.diff(stopwatch.ends)

    return turn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="blip2-opt-2.7b's configuration instead of a tiny one")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns timed on each side")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        data, cached = (frames(f"{folder}/{TASK}", 2 if args.full else 20) for _ in range(2))
        if args.full:
            build(f"{folder}/vlm")
        else:
            build_tiny(f"{folder}/vlm", [domain.INSTRUCTIONS[TASK]], SIZE)
        targets, dtype = ("language", "bfloat16") if args.full else ("all", pick_dtype(train_whole=True))
        vla = VLA.create(f"{folder}/vlm", [], A, "metaworld", SIZE, 32, targets, dtype, folder)
        own = vla.blip.config._attn_implementation
        freeze(vla.parameters())
        freeze(vla.theta() + vla.phi(), False)
        if args.full:
            cached.cache(vla)
        ours, theirs = our_turn(vla, cached, args), their_turn(vla, data, args, f"{folder}/trainer")
        attentions = {"fused": "sdpa"} if args.full else {"fused": "sdpa", "plain": "eager"}
        sides = {"ours": (ours, own), **{name: (theirs, attention) for name, attention in attentions.items()}}
        seconds = {side: [] for side in sides}
        for _ in range(args.rounds + 1):
            for side, (turn, attention) in sides.items():
                vla.blip.set_attn_implementation(attention)
                cast_once(vla.vlm, side == "ours")
                seconds[side].append(np.median(turn()))
    rate = {side: args.batch / float(np.median(times[1:])) for side, times in seconds.items()}
    size = "blip2-opt-2.7b's size, ours with --cache" if args.full else "1.2 M weights"
    for name in attentions:
        what = f"SFT, samples/s ({size}, {dtype}, batch {args.batch}; theirs with {name} attention)"
        keep("sft", {what: row(rate["ours"], rate[name], rate["ours"] / rate[name])})


if __name__ == "__main__":
    main()
