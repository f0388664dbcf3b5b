"""The paper's size: blip2-opt-2.7b's own configuration goes through every step in 14 GB. Not in CI: -m slow."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_vla

from benchmarks._full_size import build_full_size as build  # noqa: F401  run by its name
from model import VLA, describe, log_prob
from stage0_sft import sft_loss
from stage_rl import ppo_loss

GIGABYTES = 14


def through_every_step(folder):
    """Create, encode, update the head on stored latents, make a LoRA step, save, load and act again."""
    images = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8)
    instructions = ["open the drawer", "open"]
    generator = torch.Generator().manual_seed(0)
    size = {
        "action_dim": 4,
        "image_size": 84,
        "lora_rank": 32,
        "lora_targets": "language",
        "dtype": "bfloat16",
    }
    vla = make_vla(f"{folder}/new", f"{folder}/vlm", **size)
    print(describe(vla))
    with torch.no_grad():
        vla.encode(images[:1], instructions[:1])
        began = time.time()
        h, mask = vla.encode(images, instructions)
        print(
            f"encode: {(time.time() - began) / 2:.2f} seconds per image, batch 2, {torch.get_num_threads()} threads"
        )
        old = vla.explore(h.float(), mask, generator)
    assert h.shape == (2, 32 + 3, 2560) and torch.isfinite(h).all()

    optimizer = torch.optim.Adam(vla.phi(), lr=1e-3)  # stage 1: the head alone, on stored latents
    before = vla.mean(h.float(), mask).detach()
    new = log_prob(old[0], vla.mean(h.float(), mask), vla.log_std)
    ppo_loss(new, old[1], torch.tensor([1.0, -1.0]), 0.2)[0].backward()
    optimizer.step()
    assert not torch.equal(vla.mean(h.float(), mask), before)
    assert all(p.grad is None for p in vla.vlm.parameters())

    optimizer = torch.optim.AdamW(vla.theta() + vla.phi(), lr=1e-3)  # stages 0 and 2
    began = time.time()
    loss = sft_loss(vla, images[:1], instructions[:1], torch.full((1, 4), 0.3), vla.action_std)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"LoRA step: {time.time() - began:.1f} seconds, batch 1")
    with torch.no_grad():
        want = vla.act(*vla.encode(images, instructions))
        assert (
            sft_loss(vla, images[:1], instructions[:1], torch.full((1, 4), 0.3), vla.action_std)
            < loss
        )
    vla.save(f"{folder}/saved")
    del vla, optimizer, loss
    with torch.no_grad():
        loaded = VLA.load(f"{folder}/saved")
        assert torch.equal(loaded.act(*loaded.encode(images, instructions)), want)


@pytest.mark.slow
def test_full_size(tmp_path):
    """blip2-opt-2.7b goes through encode, PPO's update, a LoRA step, save and load in 14 GB (-s shows its numbers)."""
    for step in ("build", "through_every_step"):
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            f"import resource, torch, test_full_size\n"
            f"torch.set_num_threads(torch.multiprocessing.cpu_count())\n"
            f"test_full_size.{step}({str(tmp_path / 'vlm' if step == 'build' else tmp_path)!r})\n"
            f"print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 'GB')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        print(f"\n{step}\n{done.stdout}")
        peak = float(done.stdout.split("peak ")[1].split()[0])
        assert peak <= GIGABYTES
