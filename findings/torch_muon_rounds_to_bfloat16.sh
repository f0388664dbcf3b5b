#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon rounds the updates of float32 weights to bfloat16.
#
# Versions: torch 2.13.0, numpy 2.4.6, Python 3.11, CPU.
#
# Expected by most: an optimizer computes in the precision of its weights, as AdamW does. The documentation of Muon's
# arguments names no precision, and no argument chooses one.
#
# Seen: Muon's Newton-Schulz iterations run in bfloat16 whatever the weights are. Every value of a float32 weight's update
# is one that bfloat16 holds, about 1 % away from the same iterations in float32. On a CPU without units for bfloat16,
# a step also takes 10 to 15 times as long as in float32, which for small models is more than forward and backward pass
# together.
#
# Remedy: on such a CPU, the iterations in float32 in an optimizer of one's own.
#
# Output seen (the time differs between machines and is not checked):
#   shape     weights   Muon: values in bfloat16  AdamW: values in bfloat16  Muon from float32
#   128x128   float32   1.00                      0.24                       1.3% away
#   512x128   float32   1.00                      0.24                       1.1% away
#   96x288    float32   1.00                      0.24                       1.2% away
#   This CPU has units for bfloat16: False
#   8 matrices of 512x128: a step takes 15 times as long as the same iterations in float32
#   As in the header: yes
#
# Run: bash findings/torch_muon_rounds_to_bfloat16.sh
# Needs a network for pip. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu selects the small CPU
# build of torch. Ends with an exit status other than 0 if the behaviour changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON_END'
import sys
import time

import torch

torch.manual_seed(0)
torch.set_num_threads(1)


def step(optimizer_class, gradients, **options):
    """Return the weights after one step from zero at learning rate 1: minus the update."""
    weights = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    optimizer = optimizer_class(weights, lr=1.0, weight_decay=0.0, **options)
    for w, g in zip(weights, gradients):
        w.grad = g.clone()
    optimizer.step()
    return [w.detach() for w in weights]


def share_in_bfloat16(x):
    """Return the share of a float32 tensor's values that bfloat16 holds exactly."""
    return (x == x.bfloat16().float()).float().mean().item()


def newton_schulz(g):
    """Muon's five iterations with its usual coefficients, in float32."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (2.0315 * s @ s - 4.7750 * s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def seconds(work):
    times = []
    for _ in range(5):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


gradients = [torch.randn(shape) for shape in [(128, 128), (512, 128), (96, 288)]]
muon = step(torch.optim.Muon, gradients, momentum=0.0, nesterov=False)
adamw = step(torch.optim.AdamW, gradients)
row = "{:<10}{:<10}{:<26}{:<27}{}"
print(row.format("shape", "weights", "Muon: values in bfloat16", "AdamW: values in bfloat16", "Muon from float32"))
same = True
for g, m, a in zip(gradients, muon, adamw):
    exact = newton_schulz(g)
    factor = (m * exact).sum() / (exact * exact).sum()  # of the learning rate, for the matrix's shape
    error = ((m - factor * exact).norm() / m.norm()).item()
    shares = share_in_bfloat16(m), share_in_bfloat16(a)
    same &= m.dtype == torch.float32 and shares[0] == 1.0 and shares[1] < 0.5 and error > 1e-3
    shape = "x".join(map(str, g.shape))
    print(row.format(shape, "float32", f"{shares[0]:.2f}", f"{shares[1]:.2f}", f"{error:.1%} away"))
many = [torch.randn(512, 128) for _ in range(8)]
theirs = seconds(lambda: step(torch.optim.Muon, many))
plain = seconds(lambda: [newton_schulz(g) for g in many])
print("This CPU has units for bfloat16:", torch.ops.mkldnn._is_mkldnn_bf16_supported())
print(f"8 matrices of 512x128: a step takes {theirs / plain:.0f} times as long as the same iterations in float32")
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
"$python" "$folder/show.py"
