"""
Stage 2: supervised fine-tuning of the whole VLA on expert data and RL's successes (paper Sec. IV-B, Eq. 4).

    min over theta, phi of  E_{(o, l, a) in D_e + D_rl} || pi_{theta,phi}(o, l) - a ||^2                       (Eq. 4)

Starts from stage 1's checkpoint: its head phi has learned the new task, its VLM theta has not changed since the stage
before. Expert data keeps the old tasks, D_rl of all tasks so far brings the new ones into the VLM.

Where the paper is silent or this differs from it:
1) Mixture: every task is drawn equally often, however many frames it has; an RL task `--rl-weight` times as often as
   an expert task (the paper writes the plain union).
2) AdamW from new moments, short warm-up, cosine to zero, moving average, augmentation, the error's unit: as in stage 0.
3) `--freeze-vlm` trains phi alone: the paper's ablation iRe-VLA-freeze.
4) The `tiny` VLM is trained whole here too (results/experiments.md compares that with LoRA: `--theta lora`).
5) A large VLM: `--cache`, `--accumulate` and `--checkpointing` as in stage 0, whose image tokens of D_e are used again.

python stage_sft.py --parent runs/NAME-seed0/1-rl-TASK --out runs/NAME-seed0/1-sft
"""

from run import Stage, checkpoint_config, main, pick_device, ranks  # isort: skip  first, for Ctrl-C while torch is imported

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from data import Episodes, attempts
from domains import load_domain
from evaluate import evaluate_stage, finished
from model import VLA
from stage0_sft import train_sft


@dataclass
class Args:
    parent: str  # stage 1's checkpoint, e.g. runs/<name>/1-rl-<task>
    out: str  # the checkpoint to write, e.g. runs/<name>/1-sft; D_rl/ is read beside it
    data: str = "runs/D_e"  # expert episodes: <data>/<domain>/<task>/
    domain: str = ""  # domains/<name>.py; empty: the parent's
    rl_weight: float = 1.0  # how often an RL task is drawn, an expert task being 1
    freeze_vlm: bool = False  # train phi alone: iRe-VLA-freeze
    theta: Literal["whole", "lora"] = "whole"  # of a VLM without LoRA, train: whole, or lora (added here)
    lora_rank: int = 32  # of that new LoRA
    steps: int = 1400  # optimizer steps
    batch: int = 256  # frames of each step
    lr: float = 2e-4  # peak learning rate
    weight_decay: float = 0.01  # AdamW's
    augment: bool = True  # stretch, recolour and partly hide the images at random
    cache: bool = False  # keep the frozen image side's outputs on disk, made once; images are then not augmented
    accumulate: int = 1  # parts of each batch that pass the VLM one after the other; the same gradient, less memory
    checkpointing: bool = False  # compute the VLM's layers again in the backward pass: less memory, more time
    episodes: int = 25  # evaluation episodes of each task after the stage; 0: do not evaluate
    seed: int = 0  # of batches
    device: str = ""  # cpu, cuda, ...; empty: the GPU where there is one
    threads: int = os.cpu_count()  # CPU threads of torch


def story(args):
    args.domain = args.domain or checkpoint_config(args.parent)["domain"]
    domain, out = load_domain(args.domain), Path(args.out)
    rank, stage = ranks()[0], Stage(args)
    device = pick_device(args.device)
    if finished(stage, domain, args, device):
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    vla = VLA.load(args.parent, args.domain, device)
    expert, online = Path(args.data) / args.domain, out.parent / "D_rl"
    weights = {expert / task: 1.0 for task in domain.EXPERT_TASKS}
    weights |= {folder: args.rl_weight for folder in sorted(online.glob("*")) if attempts(folder)}
    data = Episodes(weights, domain, vla.config["image_size"])

    if args.theta == "lora" and not vla.has_lora:
        vla.add_lora(args.lora_rank)
    trained = vla.phi() if args.freeze_vlm else vla.theta() + vla.phi()
    train_sft(args, stage, 2, domain, data, vla, trained, args.steps, warmup=50)
    if rank:
        return
    vla.save(stage.folder, parent=args.parent, args=stage.decides)
    stage.finish(env_steps=0, frames=len(data), vlm_forwards=args.steps * args.batch)
    torch.set_num_threads(1)
    evaluate_stage(out, domain, args.episodes, device, vla=vla)


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
