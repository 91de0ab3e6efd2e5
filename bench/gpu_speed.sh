#!/usr/bin/env bash
# Speed on a GPU, in one call of under nine minutes: kernel and switch benchmarks, then MISA beside the baselines on the
# Llama-3-8B shape and on TinyLlama under a 24 GB card's limit, and the profile of one MISA step. Memory: gpu_round.sh.
#
#   bash bench/gpu_speed.sh [FOLDER]         (default bench/results/gpu_speed)
#
# Results are written as they come. Without a CUDA device the same script takes tiny shapes through the same code.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu_speed}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
failed=0

# offline machines have the dependencies but not this package
python3 -c "import misa_engine.bench" 2>/dev/null \
  || python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1

if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  sizes=() eight=gpu-8b one=gpu profiled=(--model tinyllama --length 2048 --batch 2 --device cuda)
else
  echo "no CUDA device: tiny shapes on the CPU, to show that everything works"
  sizes=(--sizes 100k) eight=quick one=quick profiled=(--model tiny --length 64 --batch 2 --delta 0.1 --device cpu)
fi
timeout 150 python3 -m pytest bench/ --benchmark-only -q "${sizes[@]}" --benchmark-json="$out/kernels.json" || failed=1
timeout 200 python3 -m misa_engine bench throughput --preset $eight --output "$out/8b" --overwrite --timeout_s 60 \
  --methods misa,misa-int8,lora,badam,lisa,unfused-misa,adamw8bit || failed=1
timeout 120 python3 -m misa_engine bench throughput --preset $one --output "$out/1b" --overwrite --timeout_s 40 \
  --methods misa,misa-int8,adamw8bit,lora,badam,lisa,unfused-misa,flashadamw || failed=1
timeout 60 python3 -m misa_engine profile "${profiled[@]}" --method misa --output "$out/profile" || failed=1
echo "speed round: $SECONDS s in all, results in $out"
exit $failed
