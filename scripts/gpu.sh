#!/usr/bin/env bash
# Test, tune and measure on a GPU, in stages, one a call, each within ten minutes. The first three take 240, 300 and 240
# seconds, the most important first, for a GPU that is there for a quarter of an hour; the others are longer:
#
#   scripts/gpu.sh check        every Triton kernel and tile against float64; builds nothing
#   scripts/gpu.sh time         the same kernels and tiles over their floors; builds nothing
#   scripts/gpu.sh models       latency and memory of SD1.5 and SDXL; needs diffusers
#   scripts/gpu.sh kernels      tests on the device, tile tuning, benchmarks of every kernel
#   scripts/gpu.sh backbones    full-size networks with random weights: latency and memory; needs diffusers
#   scripts/gpu.sh mini DIR     trains the embedded model on the photographs of DIR; another call continues
#
# Run it in an environment with torch, triton, pytest, pytest-benchmark and a C++ compiler; nothing is downloaded:
# `python scripts/gpu_first.py wheels` names the packages to bring along. Results land in benchmarks/results/
# (gpu-check.json, gpu-time.json, tuning-<gpu>.json, speed-gpu.json, backbones-gpu-<model>.json, gpu-<stage>.log), in the
# tables of benchmarks/README.md, and weights in build/mini-gpu. A step that fails does not stop the next; the exit status
# says whether one did. Where there is no git history, TRACE_FAST_COMMIT names the commit.
set -u
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET TRACE_FAST_BACKEND
stage=${1:-} results=benchmarks/results failed=0
several=$(python3 -c 'import xdist; print("-n 8")' 2> /dev/null)  # most of a test is compiling its kernel
case $stage in
  check | time | models | kernels | backbones) ;;
  mini) photographs=${2:?gpu.sh: mini needs a folder of photographs} ;;
  *) echo "gpu.sh: stage must be check, time, models, kernels, backbones or mini, got '$stage'" >&2; exit 2 ;;
esac
python3 -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "gpu.sh: torch sees no GPU")' || exit 1
exec > >(tee "$results/gpu-$stage.log") 2>&1

step() { # seconds it may take, command
  local limit=$1 start=$SECONDS
  shift
  echo "== $*"
  timeout -s INT -k 30 "$limit" "$@" || { failed=1; echo "== FAILED"; }
  echo "== $((SECONDS - start)) s"
}

measure_backbones() { # models and the seconds that each may take; what was measured before a step ran out of them stays
  local entry model
  for entry in "$@"; do
    model=${entry%:*}
    step "${entry#*:}" python3 -m pytest -q -W default benchmarks/bench_backbones.py -k "$model" --benchmark-only \
      --benchmark-json="$results/backbones-gpu-${model,,}.json"
  done
}

if command -v nvcc > /dev/null; then export TRACE_FAST_CUDA=1; fi
case $stage in check | time) ;; *) step 90 python3 -m pip install -q --no-deps --no-build-isolation -e . ;; esac
case $stage in
  check) step 220 python3 scripts/gpu_first.py check --seconds 190 ;;
  time) step 280 python3 scripts/gpu_first.py time --seconds 250 ;;
  kernels)
    step 230 python3 -m pytest -q -W default $several --durations=5 \
      -k 'triton or gpu or graph or synchroni or cuda' \
      tests/test_{attention,readout,divergence,dispatch,tracer,regions}.py
    step 120 python3 scripts/tune_kernels.py
    step 160 python3 -m pytest -q -W default benchmarks/bench_attention.py benchmarks/bench_divergence.py -k cuda \
      --benchmark-only --benchmark-json=$results/speed-gpu.json
    ;;
  models) measure_backbones SD1.5:60 SDXL:80 ;;
  backbones) measure_backbones SD1.5:60 SDXL:80 PixArt:60 SD3.5-M:90 SD3.5-L:100 FLUX.1:120 ;;
  mini)
    step 540 python3 -m trace_fast pretrain "$photographs" -o build/mini-gpu --device cuda --compile \
      --workers "$(nproc)" --batch 512 --dim 192 --images 4000000 --minutes 8
    ;;
esac
case $stage in check | time) exit $failed ;; esac  # tables need the whole package
step 10 python3 scripts/tables.py
exit $failed
