#!/usr/bin/env bash
# transformers 5.23.0: a BLIP-2 that is loaded in float16 and saved comes back in float32.
#
# Versions: transformers 5.23.0, torch 2.13.0, numpy 2.4.6, Python 3.11, CPU.
#
# Expected by most: a model loaded with dtype=torch.float16 reports model.dtype float16. After save_pretrained and
# from_pretrained(dtype="auto") it has the precision that it was saved in. T5 does so, although it too keeps a part of
# itself in float32.
#
# Seen: in float16, BLIP-2 keeps its Q-Former and its query tokens in float32. model.dtype is the precision of the first
# parameter, which is the query tokens. So model.dtype is float32, although the vision tower and the language model are
# in float16. save_pretrained writes that dtype into config.json, next to weights in float16. dtype="auto" reads it
# there and loads every weight in float32. The larger the language model, the closer that is to twice the memory. In
# bfloat16 nothing is kept in float32, and the dtype survives.
#
# Remedy: name the dtype at every load, or load in bfloat16. Cast images to the vision tower's dtype instead of
# model.dtype.
#
# Output seen:
#   model    loaded in   kept in float32     model.dtype   config.json   again, with "auto"    MB before   after
#   OPT      float16     0% of the bytes     float16       float16       float16               1.6         1.6
#   OPT      bfloat16    0% of the bytes     bfloat16      bfloat16      bfloat16              1.6         1.6
#   T5       float16     40% of the bytes    float16       float16       float16 and float32   2.6         2.6
#   T5       bfloat16    0% of the bytes     bfloat16      bfloat16      bfloat16              2.1         2.1
#   BLIP-2   float16     42% of the bytes    float32       float32       float32               4.4         7.0
#   BLIP-2   bfloat16    0% of the bytes     bfloat16      bfloat16      bfloat16              3.5         3.5
#   As in the header: yes
#
# Run: bash findings/blip2_float16_reloads_as_float32.sh
# Needs a network for pip. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu selects the small CPU
# build of torch. Ends with an exit status other than 0 if the behaviour changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON_END'
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
opt = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "vocab_size": 1000, **layers}
width = {"hidden_size": 128, "intermediate_size": 512, **layers}
blip2 = {
    "vision_config": {**width, "image_size": 28, "patch_size": 14},
    "qformer_config": {**width, "encoder_hidden_size": 128, "vocab_size": 100},
    "text_config": {"model_type": "opt", **opt},
    "num_query_tokens": 4,
    "image_token_index": 999,
}
t5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 2, "vocab_size": 1000}
models = {
    "OPT": (OPTForCausalLM, OPTConfig(**opt)),
    "T5": (T5ForConditionalGeneration, T5Config(**t5)),
    "BLIP-2": (Blip2ForConditionalGeneration, Blip2Config(**blip2)),
}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def shares(model):
    """Return the bytes of a model's weights by precision."""
    sizes = Counter()
    for p in model.parameters():
        sizes[name(p.dtype)] += p.numel() * p.element_size()
    return sizes


def load_twice(kind, config, dtype):
    """Return what a model reports, and what it is after a save and a load with "auto"."""
    with tempfile.TemporaryDirectory() as folder:
        original, saved = Path(folder, "original"), Path(folder, "saved")
        kind(config).save_pretrained(original)
        model = kind.from_pretrained(original, dtype=dtype)
        model.save_pretrained(saved)
        again = kind.from_pretrained(saved, dtype="auto")
        recorded = json.loads((saved / "config.json").read_text())["dtype"]
    return shares(model), name(model.dtype), recorded, shares(again)


row = "{:<9}{:<12}{:<20}{:<14}{:<14}{:<22}{:<12}{}"
titles = "model", "loaded in", "kept in float32", "model.dtype", "config.json", 'again, with "auto"'
print(row.format(*titles, "MB before", "after"))
seen = {}
for model, (kind, config) in models.items():
    for dtype in (torch.float16, torch.bfloat16):
        before, reported, recorded, after = load_twice(kind, config, dtype)
        kept = f"{before['float32'] / sum(before.values()):.0%} of the bytes"
        precisions = " and ".join(sorted(after))
        sizes = [f"{sum(s.values()) / 1e6:.1f}" for s in (before, after)]
        print(row.format(model, name(dtype), kept, reported, recorded, precisions, *sizes))
        seen[model, name(dtype)] = reported, recorded, precisions
same = (
    seen["BLIP-2", "float16"] == ("float32", "float32", "float32")
    and seen["BLIP-2", "bfloat16"] == ("bfloat16", "bfloat16", "bfloat16")
    and seen["T5", "float16"] == ("float16", "float16", "float16 and float32")
)
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
"$python" "$folder/show.py"
