"""What a VLA costs: memory by its VLM's configuration, with nothing loaded, and seconds as measured on this machine."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

import stage0_sft
from common.backbone import SMALL_VLM, local_vlm
from common.devices import use_threads
from model import LORA_TARGETS, VLA, Head, VLAConfig, set_trainable

# Copies of the trained weights in SFT: the gradient and that of a batch's part, two moments, the average.
SFT_COPIES = 5
PEAK = (
    # Measured: the peak of a step's memory over what autograd keeps, with `tiny` (1.4 in float32,
    # 2.1 in bfloat16).
    1.5
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class Layers:
    """Transformer layers of one kind."""

    number: int
    tokens: int
    width: int
    heads: int

    def kept_numbers(self, checkpointing: bool) -> float:
        """Return how many numbers one sample leaves for the backward pass (Korthikanti et al., 2205.05198, Eq. 2)."""
        layer = 17 * self.tokens * self.width + 2.5 * self.heads * self.tokens**2
        if checkpointing:  # each layer's input, and one layer at a time
            return self.number * self.tokens * self.width + layer
        return self.number * layer


@dataclass
class VLACosts:
    """A VLA's sizes. Bytes are those of one process."""

    parameters: int  # weights of the VLM
    theta: int  # those that stage 0 trains
    phi: int  # weights of the action head
    tokens: int  # M
    width: int  # D
    weights: int  # bytes of all weights
    number_bytes: int  # bytes of a number in the VLM's arithmetic
    layers: tuple[Layers, Layers, Layers]  # vision tower, Q-Former, language model
    lora_targets: str  # "all", "language", or "" if theta is the whole VLM

    def trained_bytes(self, vlm: bool) -> int:
        """Return the bytes of the trained weights: phi, and theta if the VLM is trained too."""
        return 4 * (self.phi + (self.theta if vlm else 0))

    def activation_bytes(self, vlm: bool, checkpointing: bool = False) -> float:
        """Return the peak bytes of a training step for each of its samples."""
        head = 4 * 4 * self.tokens * self.width
        if not vlm:
            return PEAK * head
        layers = self.layers[2:] if self.lora_targets == "language" else self.layers
        return PEAK * (
            head + self.number_bytes * sum(kind.kept_numbers(checkpointing) for kind in layers)
        )


def vla_costs(
    config: Blip2Config, args: stage0_sft.Args, action_dim: int, instructions: list[str]
) -> VLACosts:
    """Return the sizes of the VLA that stage 0, started with `args`, makes of a BLIP-2's configuration."""
    whole = args.vlm == "tiny" or args.theta == "whole"
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    with torch.device("meta"):  # tensors with shapes and no content
        vlm = Blip2ForConditionalGeneration(config)
        head = Head(text.hidden_size, action_dim)
    parameters = sum(p.numel() for p in vlm.parameters())
    phi = sum(p.numel() for p in head.parameters())
    lora = 0
    for name, module in vlm.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(LORA_TARGETS[args.lora_targets], name):
            lora += args.lora_rank * (module.in_features + module.out_features)
    number_bytes = 2 if args.dtype == "bfloat16" else 4
    vlm_bytes = (4 if whole else number_bytes) * parameters + (0 if whole else 4 * lora)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    queries = config.num_query_tokens
    words = round(np.median([len(s.split()) for s in instructions])) + 1
    return VLACosts(
        parameters=parameters,
        theta=parameters if whole else lora,
        phi=phi,
        tokens=queries + words,
        width=text.hidden_size,
        weights=vlm_bytes + 4 * phi,
        number_bytes=number_bytes,
        layers=(
            Layers(
                vision.num_hidden_layers, patches, vision.hidden_size, vision.num_attention_heads
            ),
            Layers(
                qformer.num_hidden_layers, queries, qformer.hidden_size, qformer.num_attention_heads
            ),
            Layers(
                text.num_hidden_layers, queries + words, text.hidden_size, text.num_attention_heads
            ),
        ),
        lora_targets="" if whole else args.lora_targets,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Seconds


@dataclass
class Speed:
    """Seconds, as measured in small batches."""

    encode: float  # an image to its latents
    sft_sample: float  # a sample of SFT, forward and backward
    head_sample: float  # latents through the head, forward and backward


def median_seconds(work: Callable, budget: float = 0.4) -> float:
    """Return the median seconds of work(), after a first call that does not count."""
    work()
    times = []
    end = time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def weights_are_here(vlm: str | Path) -> bool:
    """Return whether a VLM's weights are on this machine: in a local folder, or in the hub's cache."""
    folder = local_vlm(str(vlm))
    if folder is not None:
        return any((folder / name).exists() for name in WEIGHT_FILES)
    return any(isinstance(try_to_load_from_cache(str(vlm), name), str) for name in WEIGHT_FILES)


def measure_speed(
    args: stage0_sft.Args, action_dim: int, instructions: list[str], folder: Path, device
) -> Speed:
    """Measure the VLA that stage 0 would make. It is loaded for this, and `tiny` is built in `folder`."""
    config = VLAConfig(
        vlm=args.vlm,
        domain=args.domain,
        action_dim=action_dim,
        image_size=args.image_size,
        dtype=args.dtype,
        theta=args.theta,
        lora_rank=args.lora_rank,
        lora_targets=args.lora_targets,
    )
    vla = VLA.create(config, instructions, folder).to(device)
    set_trainable(vla.parameters(), False)
    set_trainable(vla.theta() + vla.phi(), True)
    use_threads(args.threads)
    n = 32 if sum(p.numel() for p in vla.parameters()) < SMALL_VLM else 2
    images = np.zeros((n, args.image_size, args.image_size, 3), np.uint8)
    texts = [instructions[0]] * n
    action = torch.zeros(n, action_dim, device=device)
    with torch.no_grad():
        h, mask = vla.encode(images, texts)
        encode = median_seconds(lambda: vla.encode(images, texts)[0].sum().item()) / n
        q = vla.image_tokens(images) if args.cache else images
    trained = vla.theta() + vla.phi()
    workers = stage0_sft.BatchWorkers(args.threads, n, vla)

    def worker_gradient(k: int) -> tuple:
        share = slice(k, None, workers.num)
        return stage0_sft.sft_gradient(vla, q[share], texts[share], action[share], trained)

    sample = median_seconds(lambda: workers.mean(worker_gradient)[0].item()) / n
    h = h.float().repeat(128 // n, 1, 1)
    head = median_seconds(lambda: vla.head(h, mask[:1]).sum().backward()) / len(h)
    return Speed(encode, sample, head)
