#!/bin/sh
# All figures that need a GPU, in 8 minutes at most, into one file:
#     benchmarks/gpu.sh gpu.json
# What is installed is used: bitsandbytes for 4 bits, liger-kernel and flash-attn for their parts.
set -e
out=$(realpath -m "${1:-gpu.json}")
cd "$(dirname "$0")/.."
if ! python -c "import grasp_lora" 2>/dev/null; then
    pip install --quiet .
fi
exec timeout 540 python -m benchmarks.gpu --json "$out"
