#!/usr/bin/env bash
# Everything that needs a GPU, in one call (about five minutes): the GPU-marked tests, then real shapes with memory by
# category against the allocator. Results are appended to JSON files under the folder given (default bench/results/gpu).
#
#   bash bench/gpu_round.sh [FOLDER]
#
# Without a CUDA device only the smallest shape runs, on the CPU, to show that the script works.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# offline machines have the dependencies but not this package
python3 -c "import misa_engine.kernels" 2>/dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .

if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  failed=0
  python3 -m pytest tests -m gpu -q -p no:cacheprovider 2>&1 | tee "$out/pytest.txt" || failed=1
  python3 bench/real_shape.py --shape llama-1b --length 2048 --batch 2 --output "$out/real_shape.json"
  python3 bench/real_shape.py --shape llama-1b --length 2048 --batch 2 --checkpointing --vram_gib 24 \
    --output "$out/real_shape.json"
  python3 bench/real_shape.py --shape llama-3b --length 2048 --batch 2 --checkpointing --vram_gib 24 --delta 0.03 \
    --output "$out/real_shape.json"
  exit $failed
fi
echo "no CUDA device: running the smallest shape on the CPU only"
python3 bench/real_shape.py --shape tiny --device cpu --length 64 --steps 10 --delta 0.1 --output "$out/real_shape_cpu.json"
