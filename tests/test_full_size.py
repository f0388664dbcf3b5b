"""The paper's size: blip2-opt-2.7b's own configuration goes through every step in 14 GB. Not in CI: -m slow."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_vla
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from plan import paper_config

GIGABYTES = 14


def build(folder):
    """blip2-opt-2.7b with random bfloat16 weights, in HF's layout, never held in float32."""
    with torch.device("meta"):
        vlm = Blip2ForConditionalGeneration(paper_config())
    vlm = vlm.to(torch.bfloat16).to_empty(device="cpu")
    vlm.tie_weights()
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            p.fill_(1.0) if "norm" in name and name.endswith("weight") else p.normal_(std=0.02)
        for name, buffer in vlm.named_buffers():
            buffer.copy_(torch.arange(buffer.shape[-1])) if "position_ids" in name else buffer.zero_()
    vlm.save_pretrained(folder, max_shard_size="2GB")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "open": 2, "the": 3, "drawer": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)


def through_every_step(folder):
    """create, encode, a head update on cached latents, a LoRA step, save, load, act again."""
    from model import VLA, log_prob
    from stage0_sft import sft_loss
    from stage_rl import ppo_losses

    images = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8)
    sentences, generator = ["open the drawer", "open"], torch.Generator().manual_seed(0)
    size = dict(action_dim=4, image_size=84, lora_rank=32, lora_targets="language", dtype="bfloat16")
    vla = make_vla(f"{folder}/new", f"{folder}/vlm", **size)
    print(f"parameters: {sum(p.numel() for p in vla.vlm.parameters()) / 1e9:.2f} G, LoRA "
          f"{sum(p.numel() for p in vla.theta()) / 1e6:.1f} M")  # fmt: skip
    with torch.no_grad():
        vla.encode(images[:1], sentences[:1])
        began = time.time()
        h, mask = vla.encode(images, sentences)
        print(f"encode: {(time.time() - began) / 2:.2f} seconds per image, batch 2, {torch.get_num_threads()} threads")
        old = vla.explore(h.float(), mask, generator)
    assert h.shape == (2, 32 + 3, 2560) and torch.isfinite(h).all()

    optimizer = torch.optim.Adam(vla.phi(), lr=1e-3)  # stage 1: the head alone, on the cached latents
    before = vla.mean(h.float(), mask).detach()
    new = log_prob(old[0], vla.mean(h.float(), mask), vla.log_std)
    ppo_losses(new, old[1], torch.tensor([1.0, -1.0]), new, new, 0.2)[0].backward()
    optimizer.step()
    assert not torch.equal(vla.mean(h.float(), mask), before)
    assert all(p.grad is None for p in vla.vlm.parameters())

    optimizer = torch.optim.AdamW(vla.theta() + vla.phi(), lr=1e-3)  # stages 0 and 2
    began = time.time()
    loss = sft_loss(vla, images[:1], sentences[:1], torch.full((1, 4), 0.3), vla.action_std)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"LoRA step: {time.time() - began:.1f} seconds, batch 1")
    with torch.no_grad():
        want = vla.act(*vla.encode(images, sentences))
        assert sft_loss(vla, images[:1], sentences[:1], torch.full((1, 4), 0.3), vla.action_std) < loss
    vla.save(f"{folder}/saved")
    del vla, optimizer, loss
    with torch.no_grad():
        loaded = VLA.load(f"{folder}/saved")
        assert torch.equal(loaded.act(*loaded.encode(images, sentences)), want)


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
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        print(f"\n{step}\n{done.stdout}")
        peak = float(done.stdout.split("peak ")[1].split()[0])
        assert peak <= GIGABYTES
