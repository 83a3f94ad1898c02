# make demo   the main job on this machine: a Llama compiled, checked, timed
# make test   the CPU test suite
# make help   the rest
#
# The environment is made on first use. If $(PYTHON) has a torch (a ROCm build, say), that one is used and left alone.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
JOBS   ?= auto
ARGS   ?=

BIN   := $(VENV)/bin
# Not $(BIN)/pytest, which is elsewhere if the outer environment has one, and not "-m pytest", which puts the repository
# root on sys.path, and with it kernels/.
PYTEST := $(BIN)/python -c 'import sys; sys.path.remove(""); import pytest; sys.exit(pytest.console_main())'
STAMP := $(VENV)/.made-by-make

.PHONY: help venv demo test test-slow test-gpu lint format docs isa opcodes bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

venv: $(STAMP)  ## the environment in $(VENV)
$(STAMP): pyproject.toml tools/make_venv.py
	$(PYTHON) tools/make_venv.py --venv $(VENV) --torch "$(TORCH)" --triton "$(TRITON)"
	@touch $(STAMP)

demo: $(STAMP)  ## the main job on this machine; options: make demo ARGS="--help"
	$(BIN)/python examples/demo.py $(ARGS)

# One thread per worker: the tests compile many small things, and more threads only get in each other's way.
test: $(STAMP)  ## the CPU test suite; one file: make test ARGS=tests/test_packaging.py
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --maxprocesses 8 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)  ## what make test leaves out
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --maxprocesses 8 --dist worksteal -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a GPU, one process
	$(PYTEST) -m gpu $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(STAMP)  ## write the generated pages and run the code blocks of all pages
	$(BIN)/rocm-attn backends --markdown > docs/backends.md
	$(PYTEST) tests/examples -k "pages or blocks" $(ARGS)

isa: $(STAMP)  ## docs/amd.md and the baseline of the AMD machine code's quality: what ships, compiled
	OMP_NUM_THREADS=1 $(BIN)/python tools/isa_baseline.py $(ARGS)

opcodes: $(STAMP)  ## which instructions the simulator has, and which of them the tests execute
	rm -rf build/opcodes
	GCNSIM_OPCODES=$(CURDIR)/build/opcodes OMP_NUM_THREADS=1 $(PYTEST) -q -n $(JOBS) --maxprocesses 8 tests/gcnsim tests/kernels $(ARGS)
	PYTHONPATH=tools $(BIN)/python -m gcnsim build/opcodes

bench: $(STAMP)  ## what a call of the op costs on the CPU
	$(BIN)/python benchmarks/op_overhead.py $(ARGS)

clean:  ## remove what builds and tests leave, not the environment
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
