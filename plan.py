"""
Before a run: what Algorithm 1 will do, and the memory, disk and time that it takes here. What does not fit is refused.

Counted, with nothing loaded: the VLM of the given config on torch's meta device, where tensors have shapes and no
content. One image passes it there, forward and backward, and what autograd keeps (activations) and torch's FLOP counter
says are written down. Measured, a few seconds each: one simulator, and images and SFT samples a second of the real
weights; where they are not on this machine yet, the speed of a matrix product stands in for them.

Memory is that of one process. Activations are what autograd keeps; the peak of `tiny` with a batch of 256 was 1.6 times
that. What cannot be known before is taken at its most (every episode as long as the horizon, RL until its budget is
spent), but for times: there an episode lasts half of the horizon.

python plan.py --domain NAME --vlm tiny
python plan.py --domain NAME --vlm /models/blip2-opt-2.7b --stage0="--lora-targets language --batch 32"
"""

from run import Refusal, check_memory, free_memory, main, pick_device, read_json  # isort: skip  first, for Ctrl-C while torch is imported

import contextlib
import math
import os
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import psutil
import torch
import tyro
from huggingface_hub import try_to_load_from_cache
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, OPTConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import stage0_sft
import stage_rl
import stage_sft
from data import attempts
from domains import load_domain
from evaluate import all_tasks
from model import VLA, build_tiny, freeze, no_blip2, pick_dtype
from report import stage_order


@dataclass
class Args:
    domain: str  # domains/<name>.py
    vlm: str = "tiny"  # tiny, a local BLIP-2 folder, or a hub name such as Salesforce/blip2-opt-2.7b
    rounds: int = 4  # of RL and SFT
    method: str = "ire-vla"  # loop.sh's METHOD; sft-only has no RL
    seed: int = 0  # the run's, for the record
    run: str = ""  # the run's folder, whose finished stages are not planned again; empty: runs/<domain>-seed<seed>
    data: str = "runs/D_e"  # D_e's folder
    stage0: str = ""  # further arguments of stage0_sft.py, as in --stage0="--batch 64"
    rl: str = ""  # the same for stage_rl.py
    sft: str = ""  # the same for stage_sft.py


# ----------------------------------------------------------------------------------------------------------------------
# Counted


def paper_config():
    """Salesforce/blip2-opt-2.7b's: HF's own defaults, but for the language model, which is OPT 2.7B."""
    text = OPTConfig(
        vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, num_hidden_layers=32, num_attention_heads=32,
        ffn_dim=10240, max_position_embeddings=2048,
    )  # fmt: skip
    return Blip2Config(text_config=text.to_dict(), num_query_tokens=32, image_token_index=50265)


@dataclass
class Count:
    """What a VLA's config says: bytes, and FLOPs (two for a multiplication and an addition)."""

    parameters: int  # of the VLM
    theta: int  # of them trained in stage 0
    weights: int  # bytes of the VLA
    trained: int  # bytes
    kept: int  # bytes that one sample leaves for the way back: its activations
    encode: int  # FLOPs of an image to its latents, or of its tokens where those are cached
    both: int  # FLOPs of a sample's way there and back
    tokens: int  # M
    width: int  # D


def count(config, stage0, action_dim, words, whole, freeze_vlm=False, cache=False, checkpointing=False):
    """One image and a sentence of `words` tokens through the VLA that stage 0 makes of a BLIP-2's config, and back to
    theta and phi, or to phi alone. whole: theta is all of the VLM, else LoRA."""
    normal, dtype = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3), getattr(torch, stage0.dtype)
    kept = {}
    with torch.device("meta"):
        vlm = Blip2ForConditionalGeneration(config).eval().to(torch.float32 if whole else dtype)
        if not torch.cuda.is_available() and stage0.dtype == "bfloat16":
            vlm.set_attn_implementation("eager")  # as load_vlm does
        parameters = sum(p.numel() for p in vlm.parameters())
        vla = VLA(vlm, None, normal, {"action_dim": action_dim, "dtype": stage0.dtype})
        if not whole:
            vla.add_lora(stage0.lora_rank, stage0.lora_targets)
        trained = vla.phi() if freeze_vlm else vla.theta() + vla.phi()
        sizes = parameters, sum(p.numel() for p in vla.theta()), size(vla.parameters()), size(trained)

        vla.vlm.to(dtype)  # in place of autocast, which does not know this device
        vla.autocast = contextlib.nullcontext
        freeze(vla.parameters())
        freeze(trained, False)
        own = {storage(x) for x in [*vla.parameters(), *vla.buffers()]}
        keep = lambda x: (kept.setdefault(storage(x), x) if storage(x) not in own else 0, x)[1]  # noqa: E731
        if checkpointing:  # layers' inputs are kept out of autograd's sight
            for layer in vla.blip.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]), None)[1])
            vla.checkpoint_layers()
        vla._token_cache = {"": torch.zeros(words, dtype=torch.long)}
        with (
            patch("transformers.masking_utils.is_tracing", lambda *_: True),  # else it asks a mask what is in it
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            side, D = stage0.image_size, config.text_config.hidden_size
            q = torch.zeros(1, config.num_query_tokens, D, dtype=dtype) if cache else None
            q = vla.image_tokens(torch.zeros(1, side, side, 3, dtype=torch.uint8)) if q is None else q  # (1, Q, D)
            h, mask = vla.language(q, [""])  # (1, M, D)
            encode = flops.get_total_flops()
            vla.mean(h.float(), mask).sum().backward()
    return Count(*sizes, size(kept.values()), encode, flops.get_total_flops(), *h.shape[1:])


def size(tensors):
    return sum(x.nbytes for x in tensors)


def storage(x):
    return x.untyped_storage()._cdata  # views of a tensor share it, and count once


# ----------------------------------------------------------------------------------------------------------------------
# Measured


def seconds(work, budget=0.4):
    """Median seconds of work(), after a first time that does not count."""
    work()
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def simulator(domain, image_size):
    """(A, bytes, seconds a decision) of one simulator in this process. A robot is not moved for a plan: 0 seconds."""
    process, decisions = psutil.Process(), 15
    before = process.memory_info().rss
    env = domain.make(domain.RL_TASKS[0], image_size)
    try:
        A = env.action_space.shape[0]
        if getattr(domain, "real", str)():
            return A, 0, 0.0
        rng = np.random.default_rng(0)
        env.reset(seed=0)
        began = time.perf_counter()
        for _ in range(decisions):
            env.step(rng.uniform(-0.3, 0.3, A).astype(np.float32))
        return A, process.memory_info().rss - before, (time.perf_counter() - began) / decisions
    finally:
        env.close()


def speeds(args, source, stage0, sentences, action_dim, c, c0, folder, device):
    """Seconds of an image encoded and of an SFT sample, each in a small batch, of PPO's update for one row, and how
    they were found."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if Path(source).is_dir():
        here = any((Path(source) / name).exists() for name in names)
    else:
        here = any(isinstance(try_to_load_from_cache(source, name), str) for name in names)
    if not here:
        n, dtype = 1024, getattr(torch, stage0.dtype)
        a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
        flop = seconds(lambda: (a @ b)[0, 0].item()) / (2 * n**3)  # .item() waits for a GPU
        return c.encode * flop, c0.both * flop, 2 * (c.both - c.encode) * flop, "its weights are not here: by matmul"
    vla = VLA.create(
        args.vlm, sentences, action_dim, args.domain, stage0.image_size, stage0.lora_rank, stage0.lora_targets,
        stage0.dtype, folder,
    ).to(device)  # fmt: skip
    freeze(vla.parameters())
    freeze(vla.theta() + vla.phi(), False)
    n = 32 if c.parameters < 1e8 else 2
    images, texts = np.zeros((n, stage0.image_size, stage0.image_size, 3), np.uint8), [sentences[0]] * n
    with torch.no_grad():
        h, mask = vla.encode(images, texts)
        encode = seconds(lambda: vla.encode(images, texts)[0].sum().item()) / n
    q = vla.image_tokens(images).detach() if stage0.cache else images
    zero = torch.zeros(n, action_dim, device=device)
    torch.set_num_threads(stage0.threads)
    sample = seconds(lambda: stage0_sft.sft_gradient(vla, q, texts, zero, vla.action_std).item()) / n
    h = h.float().repeat(-(-128 // n), 1, 1)
    update = seconds(lambda: vla.head(h, mask[:1]).sum().backward()) / len(h)
    return encode, sample, 2 * update, "measured"


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def announce(args, domain):
    """Say what will run and where; the names of the stages that are left."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    stages = ["0-sft"]
    for i in range(1, args.rounds + 1):
        rl = f"{i}-rl-{domain.RL_TASKS[(i - 1) % len(domain.RL_TASKS)]}"
        stages += [f"{i}-sft"] if args.method == "sft-only" else [rl, f"{i}-sft"]
    done = [p.name for p in stage_order(args.run)]
    print(f"{args.method} on {args.domain}: {len(domain.EXPERT_TASKS)} expert, {len(domain.RL_TASKS)} RL and "
          f"{len(domain.UNSEEN_TASKS)} unseen tasks; VLM {args.vlm}, seed {args.seed}, {device}")  # fmt: skip
    print(f"stages: {'  '.join(('[done] ' if s in done else '') + s for s in stages)}")
    print(f"folder: {args.run}  (watch: tensorboard --logdir {args.run}; Ctrl-C and the same command goes on)")
    return [s for s in stages if s not in done]


def check_sft(name, a, c, others, device):
    """Refuse an SFT stage that does not fit into memory, and say what would."""
    fixed = {"weights": c.weights, "gradient, moments and average": 4 * c.trained, **others}
    parts, one = {**fixed, "activations": c.kept * -(-a.batch // a.accumulate)}, f"{c.kept / 1e6:,.1f} MB a sample"
    if os.environ.get("SFT_LAUNCH"):  # another machine's memory, or several processes'
        return print(f"{name}: {sum(parts.values()) / 1e9:,.2f} GB, {one}, less where processes share the batch")
    room = free_memory(device) - sum(fixed.values())
    ways = [f"--accumulate {math.ceil(1.6 * a.batch * c.kept / room)}"] * (room > 2 * c.kept)  # 1.6: the peak
    if room > 0:  # else the weights alone are too large
        ways += ["--checkpointing"] * (not a.checkpointing)
        ways += ["--lora-targets language --cache"] * (not a.cache and c.theta < c.parameters)
    way = "give " + " or ".join([*ways, "a smaller --vlm"])
    check_memory(sum(parts.values()), device, told(name, parts), way)


def check_rl(a, algo, c, budget, per_simulator, others, device):
    """The same for stage 1. c: for phi alone, or for all of the VLA with --train-vlm."""
    rows = a.envs * (a.rollout + 1) if algo == "ppo" else budget
    parts = {
        "weights": c.weights, "gradients, moments, best head": 2 * 4 * c.trained,  # of head and critic
        "PPO's rollout" if algo == "ppo" else "SACfD's buffer": 2 * rows * c.tokens * c.width,
        "activations": 2 * c.kept * (a.minibatch if algo == "ppo" else 2 * a.sacfd.batch),
    }  # fmt: skip
    simulators = {f"{a.envs} simulators": a.envs * per_simulator}
    way = "give a smaller --envs, --rollout or --minibatch" if algo == "ppo" else "give a smaller --envs or --env-steps"
    if device.type == "cuda":
        check_memory(sum(simulators.values()), torch.device("cpu"), told("RL", simulators), "give a smaller --envs")
    else:
        parts |= {**simulators, **others}
    check_memory(sum(parts.values()), device, told("RL", parts), f"{way}, or a smaller --vlm")


def told(name, parts):
    return f"{name}: {', '.join(f'{what} {x / 1e9:,.2f}' for what, x in parts.items())}; together they"


def story(args):
    domain = load_domain(args.domain)
    args.run = args.run or f"runs/{args.domain}-seed{args.seed}"
    left = announce(args, domain)
    if not left:
        return
    if "0-sft" not in left:  # loop.sh's START, perhaps with another VLM
        args.vlm = read_json(Path(args.run) / "0-sft/config.json")["vlm"]
    given = ["--parent", "", "--out", "", "--domain", args.domain]
    stage0 = tyro.cli(stage0_sft.Args, args=[*given[2:], "--vlm", args.vlm, *shlex.split(args.stage0)])
    stage0.demos = domain.DEMOS if stage0.demos is None else stage0.demos
    stage0.dtype = stage0.dtype or pick_dtype(train_whole=args.vlm == "tiny")
    if "0-sft" not in left:
        check_d_e(args, domain, stage0)
    rl = tyro.cli(stage_rl.Args, args=["--task", domain.RL_TASKS[0], *given, *shlex.split(args.rl)])
    sft = tyro.cli(stage_sft.Args, args=[*given, *shlex.split(args.sft)])
    (algo, budget), device = stage_rl.algo_and_budget(rl, domain), pick_device(stage0.device)
    steps = domain.STEPS if stage0.steps is None else stage0.steps
    sentences, rounds = sorted(set(domain.INSTRUCTIONS.values())), len([s for s in left if s.endswith("-sft")])
    action_dim, per_simulator, decision = simulator(domain, stage0.image_size)
    base = {"Python": psutil.Process().memory_info().rss - per_simulator} if device.type == "cpu" else {}

    with tempfile.TemporaryDirectory() as folder:
        source = args.vlm
        if args.vlm == "tiny":
            build_tiny(source := Path(folder) / "vlm", sentences, stage0.image_size)
        try:
            config = Blip2Config.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise no_blip2(source, error) from error
        words = int(np.median([len(tokenizer(s).input_ids) for s in sentences]))
        how = (config, stage0, action_dim, words, args.vlm == "tiny")
        c0 = count(*how, cache=stage0.cache, checkpointing=stage0.checkpointing)
        c1 = count(*how, freeze_vlm=not rl.train_vlm)
        c2 = count(*how, freeze_vlm=sft.freeze_vlm, cache=sft.cache, checkpointing=sft.checkpointing)
        print(f"VLM: {c0.parameters / 1e6:,.2f} M weights, theta {c0.theta / 1e6:,.2f} M; an image is {c1.tokens} "
              f"tokens of {c1.width}, {c1.encode / 1e9:,.2f} GFLOP; a sample of SFT {c0.both / 1e9:,.2f}")  # fmt: skip
        if "0-sft" in left:
            check_sft("stage 0", stage0, c0, base, device)
        if any("-rl-" in s for s in left):
            check_rl(rl, algo, c1, budget, per_simulator, base, device)
        if left != ["0-sft"]:
            check_sft("stage 2", sft, c2, base, device)
        check_disk(args, domain, left, stage0, rl, c0, rows=budget if algo == "sacfd" else 0)
        speed = speeds(args, source, stage0, sentences, action_dim, c1, c0, folder, device)

    encode, sample, update, found = speed
    print(f"speed, {found}: {1 / encode:,.1f} images/s encoded, {1 / sample:,.1f} samples/s in SFT"
          + (f", {1 / decision:,.0f} decisions/s of one simulator" if decision else ""))  # fmt: skip
    # Simulators have all cores; a CPU's encoding takes its time from them, a GPU's goes on beside.
    cores, episode = os.cpu_count(), domain.PROTOCOL["horizon"] / 2
    act = (decision + encode) / cores if device.type == "cpu" else max(decision / cores, encode)
    missing = sum(max(0, stage0.demos - len(attempts(Path(args.data) / args.domain / t))) for t in domain.EXPERT_TASKS)
    once = stage0.demos * len(domain.EXPERT_TASKS) * episode * encode if stage0.cache else 0
    update = sample if rl.train_vlm else update
    gradient = update * (rl.epochs if algo == "ppo" else 3 * rl.sacfd.utd * rl.sacfd.batch)  # three networks in SACfD
    test = lambda a: a.episodes * len(all_tasks(domain)) * episode * act  # noqa: E731
    took = {
        "D_e": missing * episode * decision / cores,
        "stage 0": once + steps * stage0.batch * sample + test(stage0),
        "RL": budget * (act + gradient) + 2 * rl.successes * episode * act + test(rl),
        "stage 2": sft.steps * sft.batch * sample * c2.both / c0.both + test(sft),
    }
    runs = {"D_e": 1, "stage 0": "0-sft" in left, "RL": len([s for s in left if "-rl-" in s])}
    runs["stage 2"] = rounds - runs["stage 0"]
    total = sum(took[name] * n for name, n in runs.items())
    print("minutes: " + ", ".join(f"{name} {took[name] / 60:,.1f}" for name, n in runs.items() if n)
          + f" (RL at most); all that is left {total / 60:,.0f}")  # fmt: skip


def check_d_e(args, domain, stage0):
    """Refuse a run whose stage 0, which records D_e, is done, and whose stage 2 would find D_e missing, hours later."""
    for task in domain.EXPERT_TASKS:
        if not attempts(folder := Path(args.data) / args.domain / task):
            raise Refusal(
                f"{folder} holds no episodes, and stage 0, which records them, is done: bring them back, or record "
                f"them anew: python stage0_sft.py --domain {args.domain} --data {args.data} --demos {stage0.demos} "
                f"--image-size {stage0.image_size} --out {args.run}-again/0-sft --steps 0 --episodes 0"
            )


def check_disk(args, domain, left, stage0, rl, c, rows):
    """Refuse what the disk does not hold. A state is written beside the one before it: there are two for a moment."""
    horizon, picture = domain.PROTOCOL["horizon"], 3 * stage0.image_size**2
    have = {t: len(attempts(Path(args.data) / args.domain / t)) for t in domain.EXPERT_TASKS}
    frames = sum(max(0, stage0.demos - n) for n in have.values()) * horizon
    online = len([s for s in left if "-rl-" in s]) * rl.successes * horizon
    parts = {
        "D_e": frames * picture, "D_rl": online * picture, "checkpoints": len(left) * c.trained,
        "states": 2 * 4 * c.trained + 2 * rows * c.tokens * c.width,
    }  # fmt: skip
    if stage0.cache:
        parts["image tokens"] = 2 * (frames + online) * (c.tokens * c.width)
    run = Path(args.run).resolve()
    where = next(p for p in (run, *run.parents) if p.exists())
    need, there = sum(parts.values()), shutil.disk_usage(where).free
    sentence = f"{told('disk', parts)} take {need / 1e9:,.2f} GB of the {there / 1e9:,.2f} GB that are free on {where}"
    if need > there:
        raise Refusal(f"{sentence}: give fewer --demos or --successes, or another disk to runs/")
    print(sentence)


if __name__ == "__main__":
    main(story, tyro.cli(Args, description=__doc__))
