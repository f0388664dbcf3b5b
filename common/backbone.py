"""The backbone: load a BLIP-2, choose its precision, build the tiny one."""

import warnings
from pathlib import Path

import huggingface_hub
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import logging as hf_logging

from common.devices import free_memory
from common.errors import UserError
from common.files import read_json, read_tensors
from common.processes import ROOT

TINY_PATCH = 16  # pixels of the square patches of `tiny`
SMALL_VLM = 50e6  # weights; a smaller VLM is fast in float32, and its matrix products are too small to be divided
MAX_WEIGHTS_SHARE = 0.6  # share of the free memory that float32 weights may take

hf_logging.disable_progress_bar()
# PEFT asks transformers by an old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def local_vlm(name: str) -> Path | None:
    """Return a local VLM's folder, looked for in the current folder and in the project, or None."""
    return next((p.resolve() for p in (Path(name), ROOT / name) if p.is_dir()), None)


def recorded_name(vlm: str) -> str:
    """Return a VLM's name in config.json.

    A folder of the project is recorded by its path in it, so that the checkpoint loads wherever the
    project is. Any other folder is recorded by its whole path, so that it loads from any folder.
    """
    folder = local_vlm(vlm)
    if folder is None or vlm == "tiny":
        return vlm
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def load_backbone(
    folder: Path, config: dict, train_whole: bool
) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerFast, BlipImageProcessorPil]:
    """Return (BLIP-2, tokenizer, image processor) by HF's from_pretrained.

    config: a checkpoint's; its "weights" are "vlm" for folder/vlm, else a local folder or a hub
    name. train_whole: whether all of the weights are trained, so that they must be float32. Raises
    UserError for what is not a BLIP-2 or is incomplete.
    """
    in_checkpoint = config["weights"] == "vlm"
    source = config["weights"]
    source = Path(folder) / "vlm" if in_checkpoint else local_vlm(source) or source
    # A frozen VLM needs no float32 weights. In one that is trained whole, small steps would round
    # to nothing.
    dtype = torch.float32 if train_whole or in_checkpoint else getattr(torch, config["dtype"])
    if in_checkpoint:
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "preprocessor_config.json",
        ):
            read_json(source / name)
        read_tensors(source / "model.safetensors")
    try:
        vlm, info = Blip2ForConditionalGeneration.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = BlipImageProcessorPil.from_pretrained(source)
    except Exception as error:  # noqa: BLE001  what a damaged file raises is the libraries' choice
        raise not_a_blip2(source, error, config_file=Path(folder) / "config.json") from error
    missing = info["missing_keys"]
    if missing:
        raise UserError(
            f"{source} lacks {min(missing)} and {len(missing) - 1} more tensors: restore it, or use another"
        )
    if not torch.cuda.is_available() and config["dtype"] == "bfloat16":
        # Torch's fused attention trains 2.5 times slower at these lengths.
        vlm.set_attn_implementation("eager")
    # Eval: no dropout, so that h depends on o and l alone.
    return vlm.eval(), tokenizer, image_processor


def pick_dtype(vlm: str) -> tuple[str, str]:
    """Return (precision of the VLM's arithmetic, the reason): bfloat16, or float32 where that is faster and fits.

    vlm: "tiny", a local BLIP-2 folder, or a hub name. On a CPU without AMX, a small VLM trains 1.4
    times faster in float32 (results/experiments.md). On a CPU without any bfloat16 units, a step of
    bfloat16 takes 8 to 15 times as long as one of float32 (torch 2.13).
    """
    if torch.cuda.is_available():
        return "bfloat16", "the GPU computes it fastest"
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has AMX units for it"
    parameters = 0 if vlm == "tiny" else count_parameters(vlm)
    if parameters < SMALL_VLM:
        return "float32", "this CPU has no AMX units for bfloat16"
    if has_bfloat16_units():
        return "bfloat16", "this CPU has units for it"
    size = 4 * parameters
    free = free_memory(torch.device("cpu"))
    if size < MAX_WEIGHTS_SHARE * free:
        return (
            "float32",
            "this CPU has no units for bfloat16, which would take about ten times as long",
        )
    return "bfloat16", (
        f"float32 weights would take {size / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB of free memory; "
        f"this CPU has no units for bfloat16, so a step takes about ten times as long as in float32"
    )


def has_bfloat16_units() -> bool:
    """Return whether this CPU computes bfloat16 in hardware, or fast enough (AVX-512)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def count_parameters(vlm: str) -> int:
    """Return the number of a BLIP-2's parameters, from its config alone. Raises UserError if there is none."""
    with torch.device("meta"):
        vlm_model = Blip2ForConditionalGeneration(read_config(vlm))
    return sum(p.numel() for p in vlm_model.parameters())


def read_config(vlm: str) -> Blip2Config:
    """Return a BLIP-2's configuration. Its weights may be missing. Raises UserError without one."""
    # transformers would read its default configuration.
    folder = local_vlm(vlm)
    if folder is not None and not (folder / "config.json").exists():
        raise not_a_blip2(vlm, FileNotFoundError("config.json is missing"))
    try:
        return Blip2Config.from_pretrained(folder or vlm)
    except (OSError, ValueError) as error:
        raise not_a_blip2(vlm, error) from error


def not_a_blip2(source: str | Path, error: Exception, config_file: Path | None = None) -> UserError:
    """Return the error for a VLM that cannot be loaded. config_file: the checkpoint's that names it, if one does."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if config_file is not None and config_file.exists():
        return UserError(
            f"the VLM {source}, which {config_file} names as its weights, cannot be loaded ({reason}): "
            f"restore it there, or correct the entry"
        )
    return UserError(
        f"--vlm {source} is not a BLIP-2 that can be loaded ({reason}): "
        f"use tiny, a local folder, or a hub name such as Salesforce/blip2-opt-2.7b"
    )


def download_checkpoint(name: str) -> str:
    """Return the local copy of a hub repository. Missing files are downloaded. Raises UserError."""
    try:
        return huggingface_hub.snapshot_download(str(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} is neither a checkpoint folder nor a repository on the hub ({reason})"
        ) from error


def build_tiny(
    folder: str | Path,
    sentences: list[str],
    image_size: int,
    width: int = 128,
    patch: int = TINY_PATCH,
    layers: tuple[int, int, int] = (2, 1, 2),
    queries: int = 8,
) -> None:
    """Write a BLIP-2 of stock classes with 1.2 M random weights, and a tokenizer that knows the words of `sentences`.

    layers: of the vision tower, the Q-Former and the language model. Draws from torch's global
    generator.
    """
    words = sorted({word for s in sentences for word in s.lower().split()})
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    # HF's default initial std of 0.02 is meant for widths near 1,000. At this width it leaves every
    # layer's output close to zero, and SFT then learns a constant; 1/sqrt(width) = 0.09 trains.
    std = width**-0.5
    shape = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 4 * width}
    vision = {
        **shape,
        "num_hidden_layers": layers[0],
        "image_size": image_size,
        "patch_size": patch,
        "initializer_range": std,
    }
    qformer = {
        **shape,
        "num_hidden_layers": layers[1],
        "encoder_hidden_size": width,
        "cross_attention_frequency": 1,
        "vocab_size": 2,
        "initializer_range": std,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    text = OPTConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_attention_heads=4,
        num_hidden_layers=layers[2],
        max_position_embeddings=64,
        dropout=0.0,
        init_std=std,
        pad_token_id=0,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_token_index=vocab["<image>"],
    )
    vlm = Blip2ForConditionalGeneration(config)
    # HF initialises the query tokens to zeros: all equal, hence equal forever. Positions and words
    # need to differ too.
    nn.init.normal_(vlm.query_tokens, std=1.0)
    nn.init.normal_(vlm.vision_model.embeddings.position_embedding, std=0.5)
    nn.init.normal_(vlm.get_input_embeddings().weight, std=0.5)
    vlm.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        folder
    )
