#!/usr/bin/env bash
# Everything that wants a GPU, most valuable first: the engine's and the kernels' tests, kernel and switch benchmarks,
# memory limits, residents, peers, speed beside them, a profile; on real 7-14B shapes under a card's limit. Two calls of
# LIMIT_S take it all. Without a CUDA device tiny shapes take the same way.
#
#   bash bench/gpu_round.sh [FOLDER [ARCHIVE.tar.gz]]      (default bench/results/gpu; no archive)
#   WHEELS="DIR ..."   folders of wheels to install first, for a machine without a network: give them in parts
#   SUITE=residents    only what rests in 8 bits: 8B in 12 GiB and 14B in 24, random weights (about 4 minutes); another
#                      FOLDER than the round's
#   LIMIT_S=560        seconds of the whole call; what the deadline cuts off is a row "not run", and a second call with
#                      the same FOLDER goes on there
#
# Results and archive are whole after each case, also when the call is killed: SIGTERM ends the running case and its
# children. The archive holds everything but raw memory snapshots, which stay in FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
archive=${2:-}
limit_s=${LIMIT_S:-560}
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

for folder in ${WHEELS:-}; do # into site-packages: with --target pyarrow breaks pickling
  python3 -m pip install -q --no-index --no-deps --no-compile "$folder"/*.whl || echo "not all of $folder was installed"
done
python3 - <<'END'
from importlib.util import find_spec
packages = "pytest pytest_benchmark peft bitsandbytes badam galore_torch optimi lomo_optim flashoptim torchao liger_kernel rich matplotlib"
missing = [name for name in packages.split() if find_spec(name) is None]
print("missing, so their rows say so:", " ".join(missing) or "nothing")
END
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
echo "attention: torch's flash kernel where there is a GPU (what a 24 GB card uses and the plan counts on)"

options=("${SUITE:-round}" --output "$out" --resume --deadline_s $((limit_s - SECONDS)))
[ -n "$archive" ] && options+=(--archive "$archive")
# exec: a signal to this call reaches the run itself
exec python3 -m misa_engine bench "${options[@]}"
