"""A BLIP-2 of blip2-opt-2.7b's configuration with random weights, for benchmarks and the slow test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


def paper_config() -> Blip2Config:
    """Return the configuration of Salesforce/blip2-opt-2.7b: HF's defaults, except for the language model, OPT 2.7B."""
    text = OPTConfig(
        vocab_size=50304,
        hidden_size=2560,
        word_embed_proj_dim=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        ffn_dim=10240,
        max_position_embeddings=2048,
    )
    return Blip2Config(text_config=text.to_dict(), num_query_tokens=32, image_token_index=50265)


def build_full_size(folder: str | Path) -> None:
    """Write it in HF's layout, in bfloat16. It is never held in float32."""
    with torch.device("meta"):
        vlm = Blip2ForConditionalGeneration(paper_config())
    vlm = vlm.to(torch.bfloat16).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    vlm.tie_weights()
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1.0)
            else:
                p.normal_(std=0.02)
        for name, buffer in vlm.named_buffers():
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.shape[-1]))
            else:
                buffer.zero_()
    vlm.save_pretrained(folder, max_shard_size="2GB")
    vocabulary = {"<pad>": 0, "<unk>": 1, "open": 2, "the": 3, "drawer": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
