#!/usr/bin/env bash
# One visit to a GPU machine: the GPU tests, then the demo at a real size. Logs under $OUT (or build/gpu).
set -uo pipefail
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -2
export PYTHONUNBUFFERED=1
pytest_() { python3 -c 'import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.console_main())' "$@"; }
OMP_NUM_THREADS=1 timeout 380 bash -c "$(declare -f pytest_); pytest_ -m gpu -n 12 -q --show-capture=no tests/gpu" > "$OUT/tests.log" 2>&1
tail -40 "$OUT/tests.log" | cut -c1-240
timeout 200 python3 examples/demo.py "$@" > "$OUT/demo.log" 2>&1
tail -60 "$OUT/demo.log"
