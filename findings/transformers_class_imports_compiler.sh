#!/usr/bin/env bash
# transformers 5.23.0: importing one model class imports torch's compiler, its distributed tensors, and a server.
#
# Versions: transformers 5.23.0, torch 2.13.0, numpy 2.4.6, Python 3.11, CPU.
#
# Expected by most: transformers loads lazily, so `from transformers import Blip2ForConditionalGeneration` imports that
# model's file, and what a forward pass in eager mode needs.
#
# Seen: after torch and the model's configuration are there, the class imports about a thousand more modules. Among them
# are torch._dynamo with sympy, torch.distributed.tensor and FSDP, the engine of continuous batching, and the losses of
# D-FINE and RT-DETR, two object detectors. Where scipy is installed, the detectors' losses import scipy.optimize too.
# The class takes longer to import than torch itself, in every process of a program that has several.
#
# Remedy: none found, short of processes that import it once and fork.
#
# Output seen (seconds and megabytes differ between machines and are not checked):
#   import                                    modules   CPU seconds   MB
#   numpy                                     136       0.2           16
#   torch                                     950       1.8           194
#   Blip2Config                               264       1.6           23
#   Blip2ForConditionalGeneration             1062      2.6           90
#   new with the class: torch._dynamo, sympy, torch.distributed.tensor, torch.distributed.fsdp, [the other three]
#   As in the header: yes
#
# Run: bash findings/transformers_class_imports_compiler.sh
# Needs a network for pip. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu selects the small CPU
# build of torch. Ends with an exit status other than 0 if the behaviour changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON_END'
import importlib
import resource
import sys
import time

UNNEEDED = (
    "torch._dynamo",
    "sympy",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "transformers.generation.continuous_batching",
    "transformers.loss.loss_d_fine",
    "transformers.loss.loss_rt_detr",
)
row = "{:<42}{:<10}{:<14}{}"
print(row.format("import", "modules", "CPU seconds", "MB"))
for module, name in (
    ("numpy", None),
    ("torch", None),
    ("transformers", "Blip2Config"),
    ("transformers", "Blip2ForConditionalGeneration"),
):
    before = set(sys.modules)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    imported = importlib.import_module(module)
    if name:
        getattr(imported, name)
    seconds = time.process_time() - began
    added = set(sys.modules) - before
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(row.format(name or module, len(added), f"{seconds:.1f}", f"{megabytes:.0f}"))
print("new with the class:", ", ".join(name for name in UNNEEDED if name in added))
same = added.issuperset(UNNEEDED) and len(added) > 500
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
"$python" "$folder/show.py"
