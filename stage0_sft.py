"""
Stage 0: supervised fine-tuning of the whole VLA on expert data (paper Sec. IV-B, Eq. 2).

    min over theta, phi of  E_{(o, l, a) in D_e} || pi_{theta,phi}(o, l) - a ||^2                              (Eq. 2)

First the domain's scripted expert records D_e where it is missing: the domain's DEMOS successes of each expert task.

Where the paper is silent or this differs from it:
1) Demonstrations: the expert's action is executed with Gaussian noise on every dimension but the last (the gripper),
   and its clean action is the label. So the data shows how to come back from small errors (DART, 1703.09327). In some
   domains (KICKS) a few decisions in a row are random now and then, so that it also shows how to come back from a miss.
2) The error is taken in units of each action dimension's standard deviation over D_e, so that each counts alike; mean
   and deviation travel in the checkpoint.
3) Every task is drawn equally often, however long its episodes are. Images are stretched, recoloured and partly hidden
   at random (`augment`): a VLM that has seen the world would need less of that, `tiny` knows nothing else.
4) AdamW, linear warm-up, cosine to zero; the weights kept are an exponential moving average over the last steps.
5) The `tiny` VLM is random, so all its weights are trained here; a pre-trained one gets LoRA, as in the paper.
6) For a large VLM: `--lora-targets language --cache` computes the vision tower and the Q-Former once per image for all
   SFT stages and keeps the result beside the episodes; images are then not augmented. `--accumulate 8` passes a batch
   in 8 parts, `--checkpointing` keeps only the layers' inputs: neither changes the gradient.

python stage0_sft.py --domain NAME --out runs/NAME-seed0/0-sft        2 CPU cores: 20 to 50 minutes
"""

from run import (  # isort: skip  first, for Ctrl-C while torch is imported
    Refusal,
    Stage,
    alone_in,
    load_optimizer,
    main,
    mean_over_ranks,
    optimizer_tensors,
    pick_device,
    ranks,
    together,
)

import contextlib
import math
import multiprocessing as mp
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from data import EXPERT_SEED, Episodes, attempts, write_episode
from domains import load_domain
from evaluate import evaluate_stage, finished, only_simulated
from model import VLA, describe, freeze


@dataclass
class Args:
    domain: str  # domains/<name>.py
    out: str  # the checkpoint to write, e.g. runs/<name>/0-sft
    data: str = "runs/D_e"  # expert episodes: <data>/<domain>/<task>/, shared by all runs
    vlm: str = "tiny"  # tiny, a local BLIP-2 folder, or a hub name such as Salesforce/blip2-opt-2.7b
    demos: int | None = None  # successful expert episodes of each task that D_e holds at least; None: domain's DEMOS
    noise: float | None = None  # deviation of the noise on what is recorded now; None: the domain's NOISE
    kicks: float | None = None  # chance of each decision to begin 2 to 5 random ones; None: the domain's KICKS
    image_size: int = 64  # pixels of the square camera image, in D_e and everywhere after it
    steps: int | None = None  # optimizer steps; None: the domain's STEPS
    batch: int = 256  # frames of each step
    lr: float = 7e-4  # peak learning rate
    weight_decay: float = 0.01  # AdamW's
    augment: bool = True  # stretch, recolour and partly hide the images at random
    cache: bool = False  # keep the frozen image side's outputs on disk, made once; images are then not augmented
    accumulate: int = 1  # parts of each batch that pass the VLM one after the other; the same gradient, less memory
    checkpointing: bool = False  # compute the VLM's layers again in the backward pass: less memory, more time
    lora_rank: int = 32  # of a pre-trained VLM's LoRA
    lora_targets: Literal["all", "language"] = "all"  # all linear layers, or those of the language model only
    dtype: Literal["", "bfloat16", "float32"] = ""  # of the VLM's arithmetic; empty: what this machine does fastest
    episodes: int = 25  # evaluation episodes of each task after the stage; 0: do not evaluate
    seed: int = 0  # of weights, batches and noise
    device: str = ""  # cpu, cuda, ...; empty: the GPU where there is one
    threads: int = os.cpu_count()  # CPU threads of torch, and processes that record demonstrations


# ----------------------------------------------------------------------------------------------------------------------
# D_e


def ignore_interrupt():
    """Ctrl-C is for the main process; the workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def record(job):
    """One expert episode in a worker process: attempt k of a task. Writes it if it succeeds; returns the task."""
    domain_name, task, image_size, noise, kicks, folder, k = job
    domain, cached = load_domain(domain_name), record.__dict__
    if cached.get("task") != (task, image_size):  # one simulator per process at a time
        if "env" in cached:
            cached["env"].close()
        cached["env"], cached["task"] = domain.make(task, image_size), (task, image_size)
    env, rng = cached["env"], np.random.default_rng([EXPERT_SEED + k, 1])
    obs, _ = env.reset(seed=EXPERT_SEED + k)
    images, actions, rewards, ended, kicked = [], [], [], False, 0
    while not ended:
        action = domain.expert(env)
        images.append(obs)
        actions.append(action)
        executed = action.copy()
        executed[:-1] += rng.normal(0, noise, len(action) - 1)
        if kicks and not kicked and rng.random() < kicks:
            kicked, kick = int(rng.integers(2, 6)), rng.uniform(-1, 1, len(action))
        if kicked:
            kicked, executed = kicked - 1, kick
        obs, reward, term, trunc, _ = env.step(executed.clip(-1, 1).astype(np.float32))
        rewards.append(reward)
        ended = term or trunc
    if term:
        write_episode(
            folder / f"{k:06d}.safetensors", images, actions, rewards, domain=domain_name, task=task,
            instruction=domain.INSTRUCTIONS[task], source="expert", seed=EXPERT_SEED + k, protocol=domain.PROTOCOL,
        )  # fmt: skip
    return task


def collect(args, domain, root):
    """Record what is missing of D_e: attempts 0, 1, 2, ... of each expert task until `demos` have succeeded.

    An interrupted collection goes on: an attempt is decided by its seed alone, so it may be made again.
    """
    demos = domain.DEMOS if args.demos is None else args.demos
    tried = dict.fromkeys(domain.EXPERT_TASKS, 0)
    have = {task: len(attempts(root / task)) for task in tried}
    if all(n >= demos for n in have.values()):
        return
    only_simulated(domain, "the scripted expert")
    noise = domain.NOISE if args.noise is None else args.noise
    kicks = domain.KICKS if args.kicks is None else args.kicks
    total, made = demos * len(tried), sum(have.values())
    mp.set_forkserver_preload(["evaluate", domain.__name__])  # `record` is this script's, so they do import torch
    with (
        tqdm(desc="D_e: expert episodes", total=total, initial=made, smoothing=0.05) as bar,
        mp.get_context("forkserver").Pool(args.threads, ignore_interrupt) as pool,
    ):
        while lacking := [task for task in tried if have[task] < demos]:
            jobs = []
            for task in lacking:
                done = set(attempts(root / task))
                until = max(demos, tried[task] + demos - have[task])
                if until > 10 * demos:
                    raise Refusal(f"the expert of {task} succeeds too rarely ({have[task]} of {tried[task]}): mend it")
                jobs += [
                    (args.domain, task, args.image_size, noise, kicks, root / task, k)
                    for k in range(until) if k not in done and (k >= tried[task] or not tried[task])
                ]  # fmt: skip
                tried[task] = until
            for task in pool.imap(record, jobs, chunksize=5):
                n = len(attempts(root / task))
                bar.update(n - have[task])
                have[task] = n
            for task in lacking:
                have[task] = len(attempts(root / task))


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 2


def sft_loss(model, images, instructions, action, action_std):
    """Eq. 2's squared error for a batch, in units of each action dimension's deviation: images (B, H, W, 3) uint8, B
    sentences, action (B, A) -> scalar. model: a VLA, or the DistributedDataParallel around it; or a VLA's `mean`, with
    latents (B, M, D) and their mask instead of images and sentences."""
    error = (model(images, instructions) - action) / action_std  # (B, A)
    return error.square().mean()


def sft_gradient(model, images, instructions, action, action_std, accumulate=1):
    """Add the gradient of a batch's sft_loss to the weights' .grad and return the loss; arguments as there. The batch
    passes in `accumulate` parts, one after the other; processes average their gradients once, with the last."""
    B, total = len(action), 0.0
    size = -(-B // accumulate)
    for begin in range(0, B, size):
        part, last = slice(begin, begin + size), begin + size >= B
        with contextlib.nullcontext() if last or ranks()[1] == 1 else model.no_sync():
            loss = sft_loss(model, images[part], instructions[part], action[part], action_std)
            loss = loss * (len(action[part]) / B)
            loss.backward()
        total = total + loss.detach()
    return total


def draw_augmentation(n, views, rng, rank=0, world=1):
    """The random numbers of `augment` for n images of so many views, or this rank's share of them."""
    zoom, shift = rng.normal(0, 0.13, (n, views, 2)), rng.uniform(-0.1, 0.1, (n, views, 2))  # log, share of half a view
    order, factor = rng.permuted(np.tile([0, 1, 2], (n, 1)), axis=1), rng.uniform(0.6, 1.4, (n, 3))
    colour = np.eye(3)[order] * factor[:, None]  # (n, 3, 3): channels swapped, each with its own brightness
    colour[rng.random(n) < 0.5] = np.eye(3)
    size = rng.uniform(0.05, 0.2, (n, 3, 2)) * (rng.random((n, 3, 1)) < 0.5)  # of three patches, some of them none
    corner, patch = rng.random((n, 3, 2)), rng.integers(0, 256, (n, 3, 3))
    drawn = zoom, shift, colour, corner, size, patch
    return [torch.from_numpy(x[rank::world].astype(np.float32)) for x in drawn]


def augment(images, drawn):
    """Images (B, H, W, 3) uint8 as they might have been, (B, H, W, 3) uint8: each of the views, which lie one above the
    other, stretched and shifted by its own random numbers (DrQ 2004.13649 shifts), half of the images in other colours,
    and up to three patches of one colour in the place of what was there (random erasing, 1708.04896)."""
    # fmt: off
    zoom, shift, colour, corner, size, patch = drawn
    B, H, W, _ = images.shape
    V = zoom.shape[1]
    x = torch.from_numpy(images).float().view(B * V, H // V, W, 3).permute(0, 3, 1, 2)  # (B V, 3, H/V, W)
    way = torch.cat([torch.diag_embed(zoom.exp()), shift[..., None]], -1).flatten(0, 1) # (B V, 2, 3)
    grid = F.affine_grid(way, x.shape, align_corners=False)                             # (B V, H/V, W, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)              # (B V, 3, H/V, W)
    x = colour.mT.repeat_interleave(V, 0) @ x.flatten(2)                                # (B V, 3, H/V W)
    x = x.round_().clamp_(0, 255).byte().mT.reshape(B, H, W, 3)
    images = x.numpy()
    for b, k in (size[..., 0] > 0).nonzero().tolist():
        begin = [round(share * n) for share, n in zip(corner[b, k].tolist(), (H, W))]
        end = [at + round(share * n) for at, share, n in zip(begin, size[b, k].tolist(), (H, W))]
        images[b, begin[0] : end[0], begin[1] : end[1]] = patch[b, k]
    return images
    # fmt: on


def parallel(vla):
    """`vla` itself, or torch's DistributedDataParallel around it where torchrun has started several processes: each
    takes its share of every batch, and gradients are averaged, so that the numbers are those of one process."""
    if ranks()[1] == 1:
        return vla
    # of a T5 the decoder's LoRA is not used; static_graph=True would do for that too, but fails with no_sync
    unused = vla.blip.config.text_config.is_encoder_decoder
    return torch.nn.parallel.DistributedDataParallel(vla, find_unused_parameters=unused)


def train_sft(args, stage, number, domain, data, vla, trained, steps, warmup):
    """Minimize Eq. 2's or, in stage 2, Eq. 4's error over the weights `trained` of `vla` on `data` (Episodes), and give
    them their moving average. A killed run goes on from the stage's last state, bit for bit.

    number: of the stage, 0 or 2. warmup: steps in which the learning rate rises to args.lr, before its cosine to zero.
    Raises Refusal when the loss is not finite.
    """
    rank, world = ranks()
    if args.batch % world:
        raise Refusal(f"--batch {args.batch} for {world} processes: each process takes the same share of a batch")
    freeze(vla.parameters())
    freeze(trained, False)
    if args.checkpointing:
        vla.checkpoint_layers()
    if args.cache:
        data.cache(vla)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        torch.nn.ParameterList(trained), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )

    tensors, counters = stage.load()
    step = counters.get("step", 0)
    if (then := counters.get("frames", len(data))) != len(data):
        raise Refusal(f"{stage.folder} began with {then:,} frames, and now there are {len(data):,}: bring back "
                      f"those, or delete it to begin anew")  # fmt: skip
    if step:
        for i, p in enumerate(trained):
            p.data.copy_(tensors[f"theta_phi.{i}"])
            average.module[i].data.copy_(tensors[f"average.{i}"])
        average.n_averaged += 1
        load_optimizer(optimizer, tensors)
    if rank == 0:
        tasks = len({path.parent for path in data.paths})
        print(f"stage {number}: Eq. {2 + number} on {len(data):,} frames of {tasks} tasks | {describe(vla)}")

    model = parallel(vla)
    bar = tqdm(desc=f"stage {number} SFT", total=steps, initial=step, smoothing=0.02, disable=rank > 0)
    losses = []
    while step < steps:
        # ----------------------------------------------------------------------
        # one step; its batch depends on (seed, step) alone
        rng = np.random.default_rng([args.seed, number, step])
        lr = args.lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, instructions, action = data.batch(rng, args.batch, rank, world)
        if args.augment and not args.cache:
            images = augment(images, draw_augmentation(args.batch, domain.VIEWS, rng, rank, world))
        action = torch.from_numpy(action).to(vla.device)
        optimizer.zero_grad()
        loss = sft_gradient(model, images, instructions, action, vla.action_std, args.accumulate)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not torch.isfinite(norm):
            raise Refusal(f"the loss is {loss.item()} at step {step}: delete {stage.folder} and give a smaller --lr")
        optimizer.step()
        average.update_parameters(torch.nn.ParameterList(trained))
        step += 1
        # ----------------------------------------------------------------------
        losses.append(mean_over_ranks(loss))
        if step % 50 == 0 or step == steps:
            stage.log(step, loss=float(np.mean(losses)), grad_norm=norm.item(), lr=lr)
            bar.set_postfix(loss=f"{np.mean(losses):.3f}")
            losses = []
        bar.update()
        if stage.due():
            state = {f"theta_phi.{i}": p.data for i, p in enumerate(trained)}
            state |= {f"average.{i}": p.data for i, p in enumerate(average.module)}
            stage.save(state | optimizer_tensors(optimizer), {"step": step, "frames": len(data)})
    bar.close()

    for p, mean in zip(trained, average.module):
        p.data.copy_(mean)


def story(args):
    domain, out = load_domain(args.domain), Path(args.out)
    if args.image_size % domain.VIEWS:
        raise Refusal(f"--image-size {args.image_size} does not divide into {args.domain}'s {domain.VIEWS} views")
    rank, stage = ranks()[0], Stage(args)
    device = pick_device(args.device)
    if finished(stage, domain, args, device):
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    steps = domain.STEPS if args.steps is None else args.steps

    root = Path(args.data) / args.domain
    if rank == 0:
        with alone_in(root):  # another run may be recording the same
            collect(args, domain, root)
        for folder in sorted(p.name for p in root.glob("[!.]*") if p.is_dir() and p.name not in domain.EXPERT_TASKS):
            print(f"{root / folder} is left out: {folder} is no expert task of {args.domain}")
    together()
    data = Episodes({root / task: 1.0 for task in domain.EXPERT_TASKS}, domain, args.image_size)
    sentences = sorted(set(domain.INSTRUCTIONS.values()))
    action_dim = data.actions[0].shape[1]

    words = sorted({*sentences, *data.instructions})  # an imported episode has its own
    vla = VLA.create(
        args.vlm, words, action_dim, args.domain, args.image_size, args.lora_rank, args.lora_targets, args.dtype,
        stage.folder,
    ).to(device)  # fmt: skip
    actions = torch.from_numpy(np.concatenate(data.actions))
    vla.action_mean.copy_(actions.mean(0))
    vla.action_std.copy_(actions.std(0).clamp(min=0.05))
    train_sft(args, stage, 0, domain, data, vla, vla.theta() + vla.phi(), steps, warmup=200)
    if rank:
        return
    vla.save(stage.folder, args=stage.decides, instructions=sentences)
    stage.finish(env_steps=0, frames=len(data), vlm_forwards=steps * args.batch)
    torch.set_num_threads(1)
    evaluate_stage(out, domain, args.episodes, device, vla=vla)


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
