"""The tiny BLIP-2 that is pre-trained: stock classes, 8-pixel patches, a tokenizer without unknown words."""

from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
)

IMAGE_SIZE = 64  # px
IMAGE_MEAN = 0.5
IMAGE_STD = 0.25


def build_vlm(
    vocabulary: int,
    patch: int = 8,
    vision: tuple[int, int, int] = (96, 3, 2),
    qformer_layers: int = 1,
    language_layers: int = 2,
    width: int = 128,
    queries: int = 16,
) -> Blip2ForConditionalGeneration:
    """Return a BLIP-2 with random weights.

    vision: the tower's width, its layers, and its MLPs' width in units of its own. width: the
    Q-Former's and the language model's. Draws from torch's global generator.
    """
    dim, layers, ratio = vision
    config = Blip2Config(
        vision_config={
            "hidden_size": dim,
            "num_attention_heads": 4,
            "intermediate_size": ratio * dim,
            "num_hidden_layers": layers,
            "image_size": IMAGE_SIZE,
            "patch_size": patch,
            "initializer_range": dim**-0.5,
        },
        qformer_config={
            "hidden_size": width,
            "num_attention_heads": 4,
            "intermediate_size": 4 * width,
            "num_hidden_layers": qformer_layers,
            "encoder_hidden_size": dim,
            "cross_attention_frequency": 1,
            "vocab_size": 2,
            "initializer_range": width**-0.5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=OPTConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_attention_heads=4,
            num_hidden_layers=language_layers,
            max_position_embeddings=128,
            dropout=0.0,
            init_std=width**-0.5,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=queries,
        image_token_index=1,
    )
    vlm = Blip2ForConditionalGeneration(config)
    # HF initialises the query tokens to zeros: all equal, hence equal forever.
    nn.init.normal_(vlm.query_tokens, std=1.0)
    nn.init.normal_(vlm.vision_model.embeddings.position_embedding, std=0.5)
    nn.init.normal_(vlm.get_input_embeddings().weight, std=width**-0.5)
    return vlm
