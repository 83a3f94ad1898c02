#!/usr/bin/env bash
# One visit to a GPU machine: kernels against float64, the GPU tests, then the demo at a real size.
# Logs go to $OUT (or build/gpu). Arguments are the demo's.
set -uo pipefail
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -2
export PYTHONUNBUFFERED=1
timeout 170 python3 benchmarks/gpu/check_triton.py --no-flex --no-perf > "$OUT/check.log" 2>&1
echo "check_triton: exit $?"
tail -12 "$OUT/check.log" | cut -c1-200
run_pytest='import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.console_main())'
OMP_NUM_THREADS=1 timeout 260 python3 -c "$run_pytest" -m gpu -n 12 -q --show-capture=no tests/gpu > "$OUT/tests.log" 2>&1
tail -12 "$OUT/tests.log" | cut -c1-200
timeout 150 python3 examples/demo.py "$@" > "$OUT/demo.log" 2>&1
tail -16 "$OUT/demo.log"
