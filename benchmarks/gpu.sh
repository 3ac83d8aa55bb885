#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: tests on the device, tile tuning, benchmarks of every kernel.
#
# Run it in an environment with torch, triton, pytest, pytest-benchmark and a C++ compiler; nothing is downloaded. Results
# land in benchmarks/results/: tuning-<gpu>.json, speed-gpu.json and gpu.log, and in the tables of benchmarks/README.md.
# A step that fails does not stop the next; the exit status says whether one did.
set -u
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET TRACE_FAST_BACKEND
python3 -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "gpu.sh: torch sees no GPU")' || exit 1
results=benchmarks/results
exec > >(tee "$results/gpu.log") 2>&1
failed=0

step() { # seconds it may take, command
  local limit=$1 start=$SECONDS
  shift
  echo "== $*"
  timeout "$limit" "$@" || { failed=1; echo "== FAILED"; }
  echo "== $((SECONDS - start)) s"
}

step 60 python3 -m pip install -q --no-deps --no-build-isolation -e .
step 200 python3 -m pytest -q --durations=5 -k 'triton or gpu or graph or synchronising' tests/test_attention.py \
  tests/test_readout.py tests/test_divergence.py tests/test_backend.py tests/test_tracer.py
step 130 python3 benchmarks/tune_kernels.py
step 190 python3 -m pytest -q benchmarks/bench_attention.py benchmarks/bench_divergence.py -k cuda \
  --benchmark-only --benchmark-json=$results/speed-gpu.json
step 10 python3 benchmarks/tables.py
exit $failed
