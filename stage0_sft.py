"""
Stage 0: supervised fine-tuning of the whole VLA on expert data (paper Sec. IV-B, Eq. 2).

    min over theta, phi of  E_{(o, l, a) in D_e} || pi_{theta,phi}(o, l) - a ||^2                              (Eq. 2)

Where D_e is missing, the domain's scripted expert records it first: DEMOS_PER_TASK successes of
each expert task.

Where the paper is silent or this differs from it:
1) Demonstrations: the expert's action is executed with Gaussian noise on every dimension but the
   last (the gripper, if any), and its clean action is the label, so the data shows how to recover from
   small errors (DART, 1703.09327). In some domains (RANDOM_BURST_PROB) a few steps in a row are
   random, so it also shows how to recover from a miss.
2) The error is in units of each action dimension's std over D_e, so that each counts alike. Mean
   and std are part of the checkpoint.
3) Every task is drawn equally often, however long its episodes are. Images are stretched,
   recoloured and partly hidden at random (common/augment.py): a VLM that has seen the world would
   need less of that, `tiny` knows nothing else.
4) Muon for the matrices between hidden layers, AdamW for everything else: with Muon `tiny` needs
   half of AdamW's steps (results/experiments.md). With LoRA, AdamW for everything. Linear warm-up,
   cosine to zero. The weights kept are an exponential moving average over the last steps.
5) The `tiny` VLM is random, so all its weights are trained here. A pre-trained one gets LoRA, as in
   the paper.
6) For a large VLM: `--lora-targets language --cache` computes the vision tower and the Q-Former
   once per image for all SFT stages (common/token_cache.py); images are then not augmented.
   `--accumulate 8` passes a batch in 8 parts, `--checkpointing` keeps only the layers' inputs.
   Neither changes the gradient.

python stage0_sft.py --domain NAME --out runs/NAME-seed0/0-sft        2 CPU cores: 20 to 50 minutes
"""

from dataclasses import dataclass
from typing import Literal

from common.cli import parse
from common.cpus import usable_cpus


@dataclass
class Args:
    domain: str  # name of a file in domains/
    out: str  # checkpoint to write, e.g. runs/<name>/0-sft
    data: str = "runs/D_e"  # folder of the expert episodes of all domains and runs
    vlm: str = "tiny"  # tiny, a BLIP-2 folder, or a hub name (Salesforce/blip2-opt-2.7b)
    demos: int | None = None  # demonstrations per task; 0: those there (default: the domain's)
    action_noise_std: float | None = None  # std of the noise on actions (default: the domain's)
    random_burst_prob: float | None = None  # of a burst, per step (default: the domain's)
    image_size: int = 64  # pixels of the square camera image, in D_e and in all later stages
    steps: int | None = None  # optimizer steps (default: the domain's STAGE0_STEPS)
    batch: int | None = None  # frames per step (default: the domain's SFT_BATCH)
    lr: float = 7e-4  # peak learning rate
    weight_decay: float = 0.01  # decoupled weight decay
    augment: bool = True  # stretch, recolour and partly hide the images at random
    cache: bool = False  # keep the frozen vision side's outputs on disk; no augmentation
    accumulate: int = 1  # parts in which a batch passes the VLM: same gradient, less memory
    checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    theta: Literal["lora", "whole"] = "lora"  # weights to train; `tiny` is always trained whole
    lora_rank: int = 32  # rank of a pre-trained VLM's LoRA
    lora_targets: Literal["all", "language"] = "all"  # linear layers that get LoRA
    dtype: Literal["", "bfloat16", "float32"] = ""  # of the VLM (default: the faster one)
    episodes: int = 25  # evaluation episodes per task after the stage; 0: none
    seed: int = 0  # seed of weights, batches and noise
    device: str = ""  # cpu, cuda, ... (default: the GPU if there is one)
    threads: int = usable_cpus()  # CPU threads of torch, and processes that record demonstrations


if __name__ == "__main__":
    ARGS = parse(Args, __doc__)  # before the imports below, which take seconds

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm import tqdm

from common.augment import augment, draw_augmentation
from common.backbone import SMALL_VLM, TINY_PATCH
from common.demonstrations import Recording, check_present, collect_demonstrations
from common.devices import pick_device, use_threads
from common.distributed import barrier, broadcast, mean_over_ranks, rank_and_world_size
from common.errors import UserError, run_cli
from common.files import folder_lock
from common.muon import Muon, is_hidden_matrix
from common.runs import Stage, load_optimizer, optimizer_tensors
from common.token_cache import use_token_cache
from data import EpisodeDataset
from domains import load_domain
from evaluate import evaluate_stage, only_simulated, skip_if_done
from model import VLA, VLAConfig, describe, set_trainable

SHORT_RUN = 1000  # optimizer steps; shorter runs warm up and average over a share of their steps
LR_UNIT = {"adamw": 1.0, "muon": 3.0}  # an optimizer's learning rate in units of --lr
MAX_WORKERS = 4  # threads that share a batch: Python itself runs in one of them at a time


@dataclass
class Schedule:
    """What differs between the SFT of stage 0 and that of stage 2."""

    number: int  # stage 0 or stage 2
    steps: int  # optimizer steps
    max_warmup: int  # steps in which the learning rate rises to its peak, before its cosine to zero

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of a step, relative to its peak."""
        warmup = self.max_warmup
        if self.steps < SHORT_RUN:
            warmup = min(warmup, max(1, self.steps // 5))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1, (step + 1) / warmup) * cosine

    def ema_decay(self) -> float:
        """Return the decay of the weights' moving average: 0.998, or 10 / steps less than 1 in a short run."""
        return 0.998 if self.steps >= SHORT_RUN else max(0.0, 1 - 10 / max(self.steps, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 2


def sft_loss(
    model: Callable, images, instructions: list[str], action: torch.Tensor, action_std: torch.Tensor
) -> torch.Tensor:
    """Eq. 2's squared error of a batch, in units of each action dimension's std: a scalar.

    model: a VLA, on images (B, H, W, 3) uint8 and B instructions; or a VLA's `mean`, on latents
    (B, M, D) and their mask. action: (B, A), the labels.
    """
    error = (model(images, instructions) - action) / action_std  # (B, A)
    return error.square().mean()


def sft_gradient(
    vla: VLA,
    images,
    instructions: list[str],
    action: torch.Tensor,
    trained: list[torch.nn.Parameter],
    accumulate: int = 1,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a batch's `sft_loss` and its gradient by each of the weights `trained`.

    The batch passes in `accumulate` parts, one after the other.
    """
    B = len(action)
    size = -(-B // accumulate)
    loss = torch.zeros((), device=action.device)
    gradient = [torch.zeros_like(p) for p in trained]
    for begin in range(0, B, size):
        part = slice(begin, begin + size)
        error = sft_loss(vla, images[part], instructions[part], action[part], vla.action_std)
        error = error * (len(action[part]) / B)
        # A T5 does not use its decoder's LoRA.
        added = torch.autograd.grad(error, trained, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(gradient, added)
        loss += error.detach()
    return loss, gradient


class BatchWorkers:
    """Threads that share each batch of this process: `num` threads of `threads` CPU threads each.

    At `tiny`'s size, two threads that take half of a batch each are faster than two that share
    every matrix product: most operations are too small to be divided (results/experiments.md). A
    large VLM's are not, and a GPU wants one thread.
    """

    def __init__(self, threads: int, batch: int, vla: VLA):
        small = sum(p.numel() for p in vla.parameters()) < SMALL_VLM and vla.device.type == "cpu"
        most = min(threads, batch, MAX_WORKERS) if small else 1
        self.num = next(n for n in range(most, 0, -1) if batch % n == 0)  # equal shares
        self.threads = max(1, threads // self.num)
        self.pool = ThreadPoolExecutor(self.num, initializer=use_threads, initargs=[self.threads])

    def mean(self, function: Callable) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the mean of function(k) = (loss, gradient) over the workers k = 0, 1, ..., num - 1."""
        results = list(self.pool.map(function, range(self.num)))
        loss, gradient = results[0]
        for other_loss, other in results[1:]:
            loss += other_loss
            torch._foreach_add_(gradient, other)
        if self.num > 1:
            torch._foreach_div_([loss, *gradient], self.num)
        return loss, gradient


def sft_optimizers(
    vla: VLA, trained: list[torch.nn.Parameter], weight_decay: float, parallel: Callable = map
) -> dict[str, torch.optim.Optimizer]:
    """Return {"adamw", "muon"}, the optimizers of the weights `trained`.

    Muon trains the matrices between hidden layers: no embedding, and not the head's last layer. If
    the VLM has LoRA, AdamW trains everything.
    """
    names = {p: name for name, p in vla.named_parameters()}
    last = (f"head.mlp.{len(vla.head.mlp) - 1}.",)
    # By identity, because a T5 calls its word embedding "shared".
    words = {m.weight for m in vla.modules() if isinstance(m, torch.nn.Embedding)}
    words.add(vla.blip.get_output_embeddings().weight)
    hidden = []
    rest = []
    for p in trained:
        muon = not vla.has_lora and p not in words and is_hidden_matrix(names[p], p, last)
        (hidden if muon else rest).append(p)
    optimizers = {"adamw": torch.optim.AdamW(rest, weight_decay=weight_decay, fused=True)}
    if hidden:
        optimizers["muon"] = Muon(hidden, weight_decay=weight_decay, parallel=parallel)
    return optimizers


def train_sft(
    args, stage: Stage, schedule: Schedule, data: EpisodeDataset, vla: VLA, trained: list
) -> None:
    """Minimise Eq. 2's error (in stage 2, Eq. 4's) over the weights `trained`, and set them to their moving average.

    A killed run resumes from the stage's last state, bit for bit. Raises UserError if the loss is
    not finite, if the batch does not divide among the processes, and if the data has changed since
    the run began.
    """
    rank, world = rank_and_world_size()
    number = schedule.number
    if args.batch % world:
        raise UserError(
            f"--batch {args.batch} does not divide among {world} processes: use a multiple of {world}"
        )
    set_trainable(vla.parameters(), False)
    set_trainable(trained, True)
    if args.checkpointing:
        vla.enable_gradient_checkpointing()
    if args.cache:
        use_token_cache(data, vla)
    workers = BatchWorkers(args.threads, args.batch // world, vla)
    parallel = workers.pool.map if workers.num > 1 else map
    optimizers = sft_optimizers(vla, trained, args.weight_decay, parallel)
    average = [p.detach().clone() for p in trained]

    # --- resume
    tensors, counters = stage.load()
    step = counters.get("step", 0)
    frames_then = counters.get("frames", len(data))
    if frames_then != len(data):
        raise UserError(
            f"{stage.folder} began with {frames_then:,} frames, but there are {len(data):,} now: "
            f"restore the episodes, or delete that folder to start again"
        )
    if step:
        for i, p in enumerate(trained):
            p.data.copy_(tensors[f"theta_phi.{i}"])
            average[i].copy_(tensors[f"average.{i}"])
        if not optimizers.keys() <= {key.split(".")[0] for key in tensors}:
            raise UserError(
                f"{stage.folder}/state.safetensors has another version's optimizer: delete that folder to start again"
            )
        for name, optimizer in optimizers.items():
            load_optimizer(optimizer, tensors, name)
    if rank == 0:
        tasks = len({path.parent for path in data.paths})
        print(
            f"stage {number}: Eq. {2 + number} on {len(data):,} frames of {tasks} tasks | {describe(vla)}"
        )

    # --- train
    broadcast(trained)

    def worker_gradient(k: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        # A step's batch depends on (seed, step) alone. Each worker of each process takes its share of it.
        rng = np.random.default_rng([args.seed, number, step])
        share = rank * workers.num + k, world * workers.num
        images, instructions, action = data.batch(rng, args.batch, *share)
        if args.augment and not args.cache:
            images = augment(images, draw_augmentation(args.batch, data.num_views, rng, *share))
        action = torch.from_numpy(action).to(vla.device)
        # Eq. 2, Eq. 4.
        return sft_gradient(vla, images, instructions, action, trained, args.accumulate)

    bar = tqdm(
        desc=f"stage {number} SFT",
        total=schedule.steps,
        initial=step,
        smoothing=0.02,
        disable=rank > 0,
    )
    losses = []
    while step < schedule.steps:
        lr = args.lr * schedule.lr_factor(step)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * LR_UNIT[name]
        loss, gradient = workers.mean(worker_gradient)
        mean_over_ranks([loss, *gradient])
        for p, g in zip(trained, gradient):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not torch.isfinite(norm):
            raise UserError(
                f"the loss is {loss.item()} at step {step}: delete {stage.folder}, then use a smaller --lr"
            )
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()  # frees the gradient before the next one is computed
        # The first step's weights begin the average.
        weight = 1 - schedule.ema_decay() if step else 1.0
        torch._foreach_lerp_(average, [p.detach() for p in trained], weight)
        step += 1

        losses.append(loss.item())
        if step % 50 == 0 or step == schedule.steps:
            stage.log(step, loss=float(np.mean(losses)), grad_norm=norm.item(), lr=lr)
            bar.set_postfix(loss=f"{np.mean(losses):.3f}")
            losses = []
        bar.update()
        if stage.should_save():
            state = {f"theta_phi.{i}": p.data for i, p in enumerate(trained)}
            state |= {f"average.{i}": p.data for i, p in enumerate(average)}
            for name, optimizer in optimizers.items():
                state |= optimizer_tensors(optimizer, name)
            stage.save(state, {"step": step, "frames": len(data)})
    bar.close()
    for p, mean in zip(trained, average):
        p.data.copy_(mean)


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def record_demonstrations(
    domain: ModuleType,
    root: Path,
    image_size: int,
    demos: int | None,
    threads: int,
    action_noise_std: float | None = None,
    random_burst_prob: float | None = None,
) -> None:
    """Record what is missing of D_e in `root`, and name the folders there that are not expert tasks.

    None stands for the domain's default.
    """
    num_demos = domain.DEMOS_PER_TASK if demos is None else demos
    recording = Recording(
        make=domain.make,
        expert=domain.expert,
        domain=domain.NAME,
        instructions=domain.INSTRUCTIONS,
        protocol=domain.PROTOCOL,
        image_size=image_size,
        action_noise_std=domain.ACTION_NOISE_STD if action_noise_std is None else action_noise_std,
        random_burst_prob=domain.RANDOM_BURST_PROB
        if random_burst_prob is None
        else random_burst_prob,
        root=root,
    )
    chosen = {
        "demos": demos,
        "action_noise_std": action_noise_std,
        "random_burst_prob": random_burst_prob,
    }
    asked = {name for name, value in chosen.items() if value is not None}
    with folder_lock(root):  # another run may be recording the same
        check_present(recording, domain.EXPERT_TASKS, num_demos, asked)
        if recording.lacking(domain.EXPERT_TASKS, num_demos):
            only_simulated(domain, "the scripted expert")
            collect_demonstrations(domain, recording, num_demos, threads)
    for folder in sorted(
        p for p in root.glob("[!.]*") if p.is_dir() and p.name not in domain.EXPERT_TASKS
    ):
        print(f"{folder} is left out: {folder.name} is not an expert task of {domain.NAME}")


def main(args: Args) -> None:
    domain = load_domain(args.domain)
    unit = math.lcm(domain.NUM_VIEWS, TINY_PATCH if args.vlm == "tiny" else 1)
    if args.image_size % unit:
        raise UserError(
            f"--image-size must be a multiple of {unit}, for {args.domain}'s {domain.NUM_VIEWS} view(s) and the VLM's "
            f"patches (got {args.image_size})"
        )
    args.batch = domain.SFT_BATCH if args.batch is None else args.batch
    args.steps = domain.STAGE0_STEPS if args.steps is None else args.steps
    stage = Stage(args)
    rank, _ = rank_and_world_size()
    device = pick_device(args.device)
    if skip_if_done(stage, domain, args, device):
        return
    use_threads(args.threads)
    torch.manual_seed(args.seed)

    # --- D_e
    root = Path(args.data) / args.domain
    if rank == 0:
        disturbance = args.action_noise_std, args.random_burst_prob
        record_demonstrations(domain, root, args.image_size, args.demos, args.threads, *disturbance)
    barrier()
    data = EpisodeDataset(
        {root / task: 1.0 for task in domain.EXPERT_TASKS}, domain, args.image_size
    )
    actions = torch.from_numpy(np.concatenate(data.actions))  # (all frames, A)

    # --- the VLA
    config = VLAConfig(
        vlm=args.vlm,
        domain=args.domain,
        action_dim=actions.shape[1],
        image_size=args.image_size,
        dtype=args.dtype,
        theta=args.theta,
        lora_rank=args.lora_rank,
        lora_targets=args.lora_targets,
    )
    instructions = sorted(set(domain.INSTRUCTIONS.values()))
    # An imported episode has its own instruction.
    words = sorted({*instructions, *data.instructions})
    vla = VLA.create(config, words, stage.folder).to(device)
    vla.action_mean.copy_(actions.mean(0))
    vla.action_std.copy_(actions.std(0).clamp(min=0.05))

    # --- Eq. 2
    train_sft(args, stage, Schedule(0, args.steps, 200), data, vla, vla.theta() + vla.phi())
    if rank:
        return
    vla.save(stage.folder, args=stage.identity_args, instructions=instructions)
    stage.finish(env_steps=0, frames=len(data), vlm_forwards=args.steps * args.batch)
    torch.set_num_threads(1)
    evaluate_stage(stage.out, domain, args.episodes, device, vla=vla)


if __name__ == "__main__":
    run_cli(main, ARGS)
