#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes: the GPU-marked tests, then memory and speed of MISA
# and its peers on real 7-8B shapes under a 24 GB card's limit. Results are written as they come.
#
#   bash bench/gpu_round.sh [FOLDER]         (default bench/results/gpu)
#
# FOLDER gets pytest.txt, memory_round.json, memory_round.md, pictures, and snapshots/ (raw, for pytorch.org/memory_viz).
# Without a CUDA device the same script takes tiny shapes through the same code on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
limit_s=${LIMIT_S:-465} # of the whole call; SECONDS counts from the start of this script
tests_s=120
failed=0

# offline machines have the dependencies but not this package
python3 -c "import misa_engine.bench" 2>/dev/null \
  || python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1

if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  timeout $tests_s python3 -m pytest tests -m gpu 2>&1 | tee "$out/pytest.txt" || failed=1
else
  echo "no CUDA device: the GPU-marked tests are skipped" | tee "$out/pytest.txt"
fi
left=$((limit_s - SECONDS))
# the round ends by itself at its deadline; timeout is there for what hangs
timeout $((left + 15)) python3 -m misa_engine.bench.memory_round --output "$out" --deadline_s $((left - 25)) || failed=1
echo "GPU round: $SECONDS s in all, results in $out"
exit $failed
