"""A calculation, not a measurement: blip2-opt-2.7b on the paper's GPUs, one RTX 4090 for stage 1 and four A100 for SFT.

Operations and bytes are counted on the meta device of torch, where tensors have no content. A GPU
is taken to reach --share of its bfloat16 peak, but no pass is faster than reading the weights once.
"Fit" counts the tensors that autograd keeps, the scores of plain attention included. Prints the
table of docs/large_vlm.md.

    python -m benchmarks.gpus
"""

import argparse
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

import stage_rl
from benchmarks._full_size import paper_config
from domains import load_domain
from model import VLA, set_trainable
from stage0_sft import Args
from tools.costs import SFT_COPIES
from tools.plan import ENV_STEPS

# How many, bfloat16 FLOP/s, bytes/s, bytes of memory, each; NVIDIA's data sheets, without sparsity.
GPUS = {
    "RTX 4090": (1, 165e12, 1.01e12, 24e9),
    "four A100 80 GB": (4, 312e12, 2.04e12, 80e9),
}
WORDS = 6  # tokens of an instruction of Meta-World
ACTION_DIM = 4
RL = stage_rl.Args(task="", parent="", out="")
DOMAIN = load_domain("metaworld")
BUDGET = ENV_STEPS["ppo"]
EPOCHS = RL.epochs
ROWS = (RL.rollout + 1) * RL.envs
STEPS = DOMAIN.STAGE0_STEPS
BATCH = 256  # frames, SFT_BATCH of the domains


@dataclass
class Count:
    """The cost of a VLA by its configuration: bytes, and FLOPs (two for a multiplication and an addition)."""

    weights: int  # bytes of the VLA
    trained: int  # bytes of the trained weights
    kept: int  # bytes that one sample leaves for the backward pass: its activations
    encode: int  # FLOPs of an image to its latents, or of its tokens if those are cached
    both: int  # FLOPs of a sample's forward and backward pass
    tokens: int  # M
    width: int  # D

    @property
    def fixed(self) -> int:
        """Return the bytes that SFT takes whatever its batch."""
        return self.weights + SFT_COPIES * self.trained


class Kept(dict):
    """The tensors that autograd keeps, each storage once, without the model's own."""

    def __init__(self, own: Iterable[torch.Tensor]):
        self.own = {self.key(x) for x in own}

    @staticmethod
    def key(x: torch.Tensor) -> int:
        return x.untyped_storage()._cdata  # views of a tensor share it

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        if self.key(x) not in self.own:
            self.setdefault(self.key(x), x)
        return x

    def keep_input(self, layer: torch.nn.Module, inputs: tuple) -> None:
        self.keep(inputs[0])


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def count(
    config: Blip2Config,
    args: Args,
    freeze_vlm: bool = False,
    cache: bool = False,
    checkpointing: bool = False,
) -> Count:
    """Count one image and an instruction through the LoRA VLA that stage 0 makes, and back to theta and phi.

    freeze_vlm: back to phi alone.
    """
    processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        vlm = Blip2ForConditionalGeneration(config).eval().to(dtype)
        vlm.set_attn_implementation("eager")  # plain attention, whose scores are kept
        vla = VLA(vlm, None, processor, {"action_dim": ACTION_DIM, "dtype": args.dtype})
        vla.add_lora(args.lora_rank, args.lora_targets)
        trained = vla.phi() if freeze_vlm else vla.theta() + vla.phi()
        weights = size(vla.parameters())
        trained_bytes = size(trained)
        vla.vlm.to(dtype)  # in place of autocast, which does not know this device
        vla.autocast = contextlib.nullcontext
        set_trainable(vla.parameters(), False)
        set_trainable(trained, True)
        kept = Kept([*vla.parameters(), *vla.buffers()])
        if checkpointing:  # autograd does not see the layers' inputs, which are kept
            for layer in vla.blip.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.register_forward_pre_hook(kept.keep_input)
            vla.enable_gradient_checkpointing()
        vla._token_cache = {"": torch.zeros(WORDS, dtype=torch.long)}
        with (
            # Else it reads a mask's content.
            patch("transformers.masking_utils.is_tracing", lambda *_: True),
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x),
        ):
            if cache:
                q = torch.zeros(
                    1, config.num_query_tokens, config.text_config.hidden_size, dtype=dtype
                )
            else:
                q = vla.image_tokens(
                    torch.zeros(1, args.image_size, args.image_size, 3, dtype=torch.uint8)
                )  # (1, Q, D)
            h, mask = vla.language(q, [""])  # (1, M, D)
            encode = flops.get_total_flops()
            vla.mean(h.float(), mask).sum().backward()
    return Count(
        weights, trained_bytes, size(kept.values()), encode, flops.get_total_flops(), *h.shape[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.4, help="of a GPU's peak")
    share = parser.parse_args().share

    everywhere = Args("", "", image_size=224, dtype="bfloat16")
    language = replace(everywhere, lora_targets="language")
    head = count(paper_config(), everywhere, freeze_vlm=True)
    kinds = {
        "LoRA everywhere": count(paper_config(), everywhere),
        "LoRA everywhere, `--checkpointing`": count(paper_config(), everywhere, checkpointing=True),
        "LoRA in the language model": count(paper_config(), language),
        "LoRA in the language model, `--cache`": count(paper_config(), language, cache=True),
    }
    update = 2 * (head.both - head.encode)  # the head and the critic
    counted = [
        f"{head.encode / 1e9:,.0f} GFLOP, {head.weights / 1e9:.1f} GB of weights read",
        f"and {EPOCHS} x {update / 1e9:.1f} GFLOP of updates each",
        f"{head.tokens} x {head.width} bfloat16 x {ROWS:,}",
    ]
    labels = [
        "stage 1, one GPU: an image to its latents, 8 at a time",
        f"stage 1, one GPU: {BUDGET:,} environment steps, without the environments",
        "stage 1: PPO's latents",
    ]
    for kind, c in kinds.items():
        fixed = f"{c.fixed / 1e9:.1f} GB and {c.kept / 1e9:.2f} a sample"
        counted += [f"{c.both / 1e9:,.0f} GFLOP a sample", fixed, f"{STEPS:,} steps of {BATCH}"]
        labels += [f"SFT, {kind}", "... that fit into one GPU", "... stage 0"]

    columns = []
    for n, peak, read, memory in GPUS.values():
        flops = share * peak
        column = [
            f"{1e3 * max(head.encode / flops, head.weights / read / 8):.1f} ms",
            f"{BUDGET * (head.encode + EPOCHS * update) / flops / 60:.0f} minutes",
            f"{2 * ROWS * head.tokens * head.width / 1e9:.2f} GB",
        ]
        for c in kinds.values():
            column += [
                f"{n * flops / c.both:,.0f} samples/s",
                f"{(memory - c.fixed) / c.kept:,.0f} samples",
                f"{STEPS * BATCH * c.both / (n * flops) / 3600:.1f} hours",
            ]
        columns.append(column)
    print(
        f"| calculated, at {share:.0%} of the peak | counted | {' | '.join(GPUS)} |\n| --- | --- | --- | --- |"
    )
    for cells in zip(labels, counted, *columns):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
