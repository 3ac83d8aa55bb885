#!/usr/bin/env bash
# Run the tests of numbers as on other machines: scripts/robust.sh [options of pytest]
#
# torch, oneDNN, MKL, numpy and the native core each choose their code by the processor, and their results differ in the
# last bits. Each is held to its oldest, a middle and its newest instruction set, with 1, 2 and 3 threads, and two
# corners are mixed; last, torch's results are changed by one unit in the last place (tests/rounding.py).
set -u
cd "$(dirname "$0")/.."
OLD='ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE'
OLD+=" NPY_DISABLE_CPU_FEATURES=$(python3 -c 'import numpy; print(*numpy._core._multiarray_umath.__cpu_dispatch__, sep=",")')"
CASES=(
  "$OLD ONEDNN_MAX_CPU_ISA=SSE41 TRACE_FAST_TEST_INSTRUCTION_SET=baseline OMP_NUM_THREADS=1"
  "ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 TRACE_FAST_TEST_INSTRUCTION_SET=avx2 OMP_NUM_THREADS=2"
  "ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=DEFAULT TRACE_FAST_TEST_INSTRUCTION_SET=avx512 OMP_NUM_THREADS=3"
  "$OLD ONEDNN_MAX_CPU_ISA=DEFAULT TRACE_FAST_TEST_INSTRUCTION_SET=avx512 OMP_NUM_THREADS=3"
  "ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=SSE41 TRACE_FAST_TEST_INSTRUCTION_SET=baseline OMP_NUM_THREADS=2"
  "TRACE_FAST_TEST_ULP=1 OMP_NUM_THREADS=1"
)
# files without numbers, and code that these variables do not change: interpreted kernels and compilers
OTHERS=(tests/test_{packaging,readme,terms,kernels}.py)
SELECTED='not triton and not compil'

supported=$(python3 -c 'from trace_fast import _C; print(*_C.instruction_sets())') || exit 1
failed=0
for case in "${CASES[@]}"; do
  # an instruction set that this processor lacks
  for name in baseline avx2 avx512; do
    [[ " $supported " == *" $name "* ]] || case=${case/TRACE_FAST_TEST_INSTRUCTION_SET=$name /}
  done
  echo "== $case"
  # shellcheck disable=SC2086
  env $case python3 -m pytest -q -p no:cacheprovider "$@" "${OTHERS[@]/#/--ignore=}" -k "$SELECTED" tests || failed=1
done
exit $failed
