#!/usr/bin/env bash
# Measures a VLM of the paper's size on an NVIDIA GPU, in at most 8 minutes, with random weights (no download).
#
#   bash tools/gpu_check.sh           writes results/benchmarks/gpu.json; docs/large_vlm.md has the calculated numbers
#   bash tools/gpu_check.sh --tiny    the same with the tiny VLM, on any machine
#
# It needs 8 GB of disk in this folder, 24 GB of memory and 40 GB of the GPU's.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
if [ "${1:-}" != --tiny ] && ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "error: torch sees no GPU: install a CUDA build of the pinned torch, or use --tiny" >&2
  exit 1
fi
timeout 480 "$PYTHON" -m benchmarks.gpu "$@" || {
  [ $? -ne 124 ] && exit 1
  echo "stopped after 8 minutes: results/benchmarks/gpu.json has what was measured until then"
}
