"""
Stage 2: supervised fine-tuning of the whole VLA on expert data and RL's successes (paper Sec. IV-B,
Eq. 4).

    min over theta, phi of  E_{(o, l, a) in D_e + D_rl} || pi_{theta,phi}(o, l) - a ||^2                       (Eq. 4)

Starts from stage 1's checkpoint: its head phi has learned the new task, its VLM theta has not
changed since the stage before. Expert data preserves the old tasks. D_rl of all tasks so far brings
the new ones into the VLM.

Where the paper is silent or this differs from it:
1) Mixture: every task is drawn equally often, however many frames it has; an RL task `--rl-weight`
   times as often as an expert task (the paper writes the plain union).
2) Muon and AdamW from new moments, short warm-up, cosine to zero, moving average, augmentation, the
   error's unit: as in stage 0.
3) `--freeze-vlm` trains phi alone: the paper's ablation iRe-VLA-freeze.
4) The `tiny` VLM is trained whole here too. results/experiments.md compares that with LoRA
   (`--theta lora`).
5) Where D_e is missing, because stage 0 came from elsewhere, it is recorded as in stage 0.
6) A large VLM: `--cache`, `--accumulate` and `--checkpointing` as in stage 0, whose image tokens of
   D_e are reused.

python stage_sft.py --parent runs/NAME-seed0/1-rl-TASK --out runs/NAME-seed0/1-sft
"""

from dataclasses import dataclass
from typing import Literal

from common.cli import parse
from common.cpus import usable_cpus


@dataclass
class Args:
    parent: str  # stage 1's checkpoint, e.g. runs/<name>/1-rl-<task>
    out: str  # checkpoint to write, e.g. runs/<name>/1-sft; D_rl/ is read next to it
    data: str = "runs/D_e"  # folder of the expert episodes: <data>/<domain>/<task>/
    demos: int | None = None  # expert episodes per task to record if there are none at all
    domain: str = ""  # name of a file in domains/ (default: the parent's)
    rl_weight: float = 1.0  # how often an RL task is drawn, relative to an expert task
    freeze_vlm: bool = False  # train phi alone: iRe-VLA-freeze
    theta: Literal["whole", "lora"] = "whole"  # weights to train if there is no LoRA yet
    lora_rank: int = 32  # rank of that new LoRA
    steps: int | None = None  # optimizer steps (default: the domain's STAGE2_STEPS)
    batch: int | None = None  # frames per step (default: the domain's SFT_BATCH)
    lr: float = 2e-4  # peak learning rate
    weight_decay: float = 0.01  # decoupled weight decay
    augment: bool = True  # stretch, recolour and partly hide the images at random
    cache: bool = False  # keep the frozen vision side's outputs on disk; no augmentation
    accumulate: int = 1  # parts in which a batch passes the VLM: same gradient, less memory
    checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    episodes: int = 25  # evaluation episodes per task after the stage; 0: none
    seed: int = 0  # seed of the batches
    device: str = ""  # cpu, cuda, ... (default: the GPU if there is one)
    threads: int = usable_cpus()  # CPU threads of torch


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

from pathlib import Path

import torch

from common.devices import pick_device, use_threads
from common.distributed import barrier, rank_and_world_size
from common.episode_file import episode_ids
from common.errors import run_cli
from common.runs import Stage, checkpoint_config
from data import EpisodeDataset
from domains import load_domain
from evaluate import evaluate_stage, skip_if_done
from model import VLA
from stage0_sft import Schedule, record_demonstrations, train_sft


def main(args: Args) -> None:
    args.domain = args.domain or checkpoint_config(args.parent)["domain"]
    domain = load_domain(args.domain)
    args.steps = domain.STAGE2_STEPS if args.steps is None else args.steps
    args.batch = domain.SFT_BATCH if args.batch is None else args.batch
    stage = Stage(args)
    rank, _ = rank_and_world_size()
    device = pick_device(args.device)
    if skip_if_done(stage, domain, args, device):
        return
    use_threads(args.threads)
    torch.manual_seed(args.seed)
    vla = VLA.load(args.parent, args.domain, device)

    # --- D_e + D_rl
    d_e = Path(args.data) / args.domain
    image_size = vla.config["image_size"]
    if rank == 0 and not any(episode_ids(d_e / task) for task in domain.EXPERT_TASKS):
        record_demonstrations(domain, d_e, image_size, args.demos, args.threads)
    barrier()
    weights = {d_e / task: 1.0 for task in domain.EXPERT_TASKS}
    learned = [folder for folder in sorted(stage.d_rl.glob("*")) if episode_ids(folder)]
    weights |= {folder: args.rl_weight for folder in learned}
    data = EpisodeDataset(weights, domain, image_size)

    # --- Eq. 4
    if args.theta == "lora" and not vla.has_lora:
        vla.add_lora(args.lora_rank)
    trained = vla.phi() if args.freeze_vlm else vla.theta() + vla.phi()
    train_sft(args, stage, Schedule(2, args.steps, 50), data, vla, trained)
    if rank:
        return
    vla.save(stage.folder, parent=args.parent, args=stage.identity_args)
    stage.finish(env_steps=0, frames=len(data), vlm_forwards=args.steps * args.batch)
    torch.set_num_threads(1)
    evaluate_stage(stage.out, domain, args.episodes, device, vla=vla)


if __name__ == "__main__":
    run_cli(main, ARGS)
