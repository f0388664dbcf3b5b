#!/usr/bin/env bash
# PEFT 0.21.2: save_pretrained to a local folder sends a request to the model hub, at every save.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, huggingface_hub 2.4.0, Python 3.11, CPU.
#
# Expected by most: saving the LoRA weights of a model in memory to a local folder uses the disk only. Neither the hub
# nor the state of the network takes part.
#
# Seen: if the base model has a hub name, each save asks the hub for config.json of that name. The default,
# save_embedding_layers="auto", compares the vocabulary there with the one in memory. A training run thus uses the
# network at every checkpoint, and sends the name of its base model to the hub. With save_embedding_layers=False the
# hub gets no request, and the saved tensors are the same. A model without a hub name sends no request either.
#
# Remedy: pass save_embedding_layers=False (or True, if the embeddings were trained or resized). The variable
# HF_HUB_OFFLINE=1 also stops the request.
#
# The hub in this script is a small HTTP server on 127.0.0.1 that counts the requests for the model and answers "not
# found". The model is a random OPT of one layer, built from a config.
#
# Output seen:
#   base model     save_embedding_layers    requests    first request
#   someone/model  default                  1           HEAD /someone/model/resolve/main/config.json
#   someone/model  default                  1           HEAD /someone/model/resolve/main/config.json
#   someone/model  default                  1           HEAD /someone/model/resolve/main/config.json
#   someone/model  False                    0           -
#   (no name)      default                  0           -
#   Same tensors saved with the default and with False: True
#   As in the header: yes
#
# Run: bash findings/peft_save_asks_hub.sh
# Needs a network for pip. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu selects the small CPU
# build of torch. Ends with an exit status other than 0 if the behaviour changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0 huggingface_hub==2.4.0 accelerate==1.15.0 \
    safetensors==0.8.0 tokenizers==0.23.3 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON_END'
import http.server
import os
import sys
import tempfile
import threading
import warnings

requests = []


class CountingHub(http.server.BaseHTTPRequestHandler):
    def answer(self):
        if self.path.startswith("/someone/model/"):  # not the client's own request, once a process
            requests.append(f"{self.command} {self.path}")
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = answer
    do_GET = answer

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CountingHub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"  # before the first import of huggingface_hub

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

warnings.filterwarnings("ignore")


def tiny_lora(**name):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **name,
    )
    return get_peft_model(OPTForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))


named = tiny_lora(name_or_path="someone/model")
unnamed = tiny_lora()
default = {}
off = {"save_embedding_layers": False}
row = "{:<15}{:<25}{:<12}{}"
print(row.format("base model", "save_embedding_layers", "requests", "first request"))
counts = []
tensors = []
for model, options in [(named, default), (named, default), (named, default), (named, off), (unnamed, default)]:
    requests.clear()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        tensors.append(load_file(f"{folder}/adapter_model.safetensors"))
    counts.append(len(requests))
    name = model.peft_config["default"].base_model_name_or_path or "(no name)"
    option = "False" if options else "default"
    print(row.format(name, option, len(requests), requests[0] if requests else "-"))

a, b = tensors[0], tensors[3]
equal = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
print("Same tensors saved with the default and with False:", equal)
same = all(n >= 1 for n in counts[:3]) and counts[3:] == [0, 0] and equal
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
(
    cd "$folder"
    # The default settings of the hub's client, and a direct way to 127.0.0.1.
    unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_TOKEN HUGGING_FACE_HUB_TOKEN
    export HF_HOME="$folder/hub" NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
    "$python" show.py
)
