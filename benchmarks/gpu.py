"""Measure the paper's size on an NVIDIA GPU: encoding, SFT steps, PPO's update, stage 1, memory.

    bash tools/gpu_check.sh                 at most 8 minutes, 8 GB of disk
    python -m benchmarks.gpu --tiny         the same on any machine, with the tiny VLM

The VLM has blip2-opt-2.7b's configuration and random weights. Each measurement is written to
results/benchmarks/gpu.json as soon as it is there, so a run that is cut short keeps what it has.
docs/large_vlm.md has the calculated table to compare with.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

import stage_rl
from benchmarks._full_size import build_full_size
from benchmarks._ppo import StoredRollout, make_learner, ppo_args
from benchmarks._turns import ROOT, save_rows
from common.backbone import build_tiny
from common.devices import cpu_threads, pick_device
from domains import load_domain
from model import VLA, VLAConfig, set_trainable
from stage0_sft import sft_gradient

TASK = "drawer-open"
ACTION_DIM = 4
ROWS = 2048  # environment steps of PPO's rollout


def save(name: str, device: torch.device, seconds: float, **numbers: object) -> None:
    """Add a row to gpu.json: seconds, further numbers, the device, and the most memory since the last row, GB."""
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        where = torch.cuda.get_device_name(device)
    else:
        memory = psutil.Process().memory_info().rss / 1e9
        where = "CPU"
    measured = {"seconds": round(seconds, 5), **numbers, "memory_gb": round(memory, 2)}
    save_rows("gpu", {name: {**measured, "device": where}})


def timed(work: Callable, device: torch.device, budget: float) -> float:
    """Return the median seconds of work(), repeated for `budget` seconds after a call that does not count."""
    work()
    seconds = []
    end = time.perf_counter() + budget
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


@contextmanager
def backbone(tiny: bool, instruction: str) -> Iterator[Path]:
    """Yield the folder of a BLIP-2 with random weights. It is deleted afterwards."""
    folder = Path(tempfile.mkdtemp(dir=ROOT))
    try:
        if tiny:
            build_tiny(folder / "vlm", [instruction], 64)
        else:
            build_full_size(folder / "vlm")
        yield folder
    finally:
        shutil.rmtree(folder)


def make_vla(folder: Path, targets: str, size: int, device: torch.device) -> VLA:
    """Return the VLA that stage 0 makes of the folder's VLM."""
    config = VLAConfig(
        vlm=str(folder / "vlm"),
        domain="metaworld",
        action_dim=ACTION_DIM,
        image_size=size,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        lora_targets=targets,
    )
    vla = VLA.create(config, [], folder).to(device)
    set_trainable(vla.parameters(), False)
    return vla


def measure_sft(vla: VLA, args: argparse.Namespace, images: np.ndarray, text: str) -> None:
    """Measure SFT steps of LoRA and head, with and without checkpointing, with the cache where it is possible."""
    trained = vla.theta() + vla.phi()
    set_trainable(trained, True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    action = torch.zeros(args.batch, ACTION_DIM, device=vla.device)
    texts = [text] * args.batch
    with torch.no_grad():
        tokens = torch.cat([vla.image_tokens(x) for x in np.array_split(images, 4)])
    inputs = {"LoRA in the language model, --cache": tokens}
    if any("lora" in name and "vision" in name for name, _ in vla.named_parameters()):
        inputs = {"LoRA everywhere": images}

    def step(images) -> None:
        _, gradient = sft_gradient(vla, images, texts, action, trained)
        for p, g in zip(trained, gradient):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    for checkpointing in (False, True):
        if checkpointing:
            vla.enable_gradient_checkpointing()
        for name, x in inputs.items():
            seconds = timed(lambda x=x: step(x), vla.device, args.seconds)
            label = f"SFT step, {name}{', --checkpointing' if checkpointing else ''}"
            rate = round(args.batch / seconds, 1)
            save(label, vla.device, seconds, batch=args.batch, samples_per_second=rate)


def measure_rl(vla: VLA, args: argparse.Namespace, images: np.ndarray, domain) -> None:
    """Measure encoding, PPO's update on stored latents, and environment steps of stage 1 with their images."""
    device = vla.device
    text = domain.INSTRUCTIONS[TASK]
    set_trainable(vla.vlm.parameters(), False)
    set_trainable(vla.phi(), True)
    vla.log_std.data.fill_(np.log(0.25))

    @torch.no_grad()
    def encode() -> tuple:
        return vla.encode(images[:8], [text] * 8)

    seconds = timed(encode, device, args.seconds)
    save("encode 8 images", device, seconds, ms_per_image=round(seconds / 8 * 1e3, 2))

    h, mask = encode()
    N = 16
    T = ROWS // N
    stored = h[:1].bfloat16().expand((T + 1) * N, -1, -1).reshape(T + 1, N, *h.shape[1:]).clone()
    rollout = StoredRollout(vla, stored, mask[:1])
    for name in ("reward", "terminated", "truncated", "valid"):
        setattr(rollout, name, getattr(rollout, name).to(device))
    learner = make_learner(vla, h.shape[-1])
    learner.critic.to(device)
    settings = ppo_args()

    def update() -> None:
        stage_rl.update(settings, learner, rollout, False, torch.Generator().manual_seed(0))

    seconds = timed(update, device, args.seconds)
    save(f"PPO's update, {settings.epochs} epochs of {ROWS} environment steps", device, seconds)

    settings = stage_rl.Args(task=TASK, parent="", out="", envs=8, rollout=25)
    live = stage_rl.Rollout(settings, vla, domain, 0)
    began = time.perf_counter()
    with cpu_threads(live.threads):
        live.collect(torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    live.close()
    steps = settings.envs * settings.rollout
    save("stage 1, 200 environment steps", device, seconds, steps_per_second=round(steps / seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny VLM instead of the paper's")
    parser.add_argument("--batch", type=int, default=32, help="samples of an SFT step")
    parser.add_argument("--seconds", type=float, default=8.0, help="time of a measurement")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device()
    domain = load_domain("metaworld")
    text = domain.INSTRUCTIONS[TASK]
    size = 64 if args.tiny else 224
    images = np.random.default_rng(0).integers(0, 256, (args.batch, size, size, 3), np.uint8)
    with backbone(args.tiny, text) as folder:
        vla = make_vla(folder, "language", size, device)
        measure_rl(vla, args, images, domain)
        measure_sft(vla, args, images, text)
        del vla
        measure_sft(make_vla(folder, "all", size, device), args, images, text)


if __name__ == "__main__":
    main()
