# Works with GNU make 3.81, as macOS ships it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# MLX's Linux wheels choose their device by an extra: cpu, or cuda on a machine with an NVIDIA GPU.
ifeq ($(shell uname -s),Linux)
EXTRAS ?= [cpu,openblas]
endif

EXAMPLES ?= 50000

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test conformance hostile fuzz scheduler load ticks faults soak drain lint protos clean

help:  ## list the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed -e 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt protos/pyproject.toml protos/build_stubs.py $(wildcard protos/mtp_router/generate/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt --force-reinstall --no-deps ./protos
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.$(EXTRAS)' --group dev
	touch $(STAMP)

demo: setup  ## fold a storm of 41 alerts into one incident summary
	$(BIN)/python examples/demo.py

serve: setup  ## start the service; Ctrl-C drains it
	$(BIN)/mtp-router serve

test: setup  ## run every test
	$(BIN)/python -m pytest

conformance: setup  ## prove the promises of the MLX engine; prints what was tried and which planted bugs were caught
	$(BIN)/python -m pytest tests/conformance

hostile: setup  ## read the corpus of hostile model files: outcome, time and peak memory of each
	$(BIN)/python benchmarks/hostile_files.py

fuzz: setup  ## fuzz the readers of model files for long; EXAMPLES=50000
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/engine/test_header_fuzz.py tests/router/test_gguf_fuzz.py

scheduler: setup  ## drive the scheduler through 100,000 random steps and check it after each
	$(BIN)/python -m benchmarks.scheduler

load: setup  ## 500 streams through the router, alone and beside the engine: what it adds to each delta
	$(BIN)/python -m benchmarks.load

ticks: setup  ## how late the event loop is while the MLX engine decodes beside it
	$(BIN)/python -m benchmarks.ticks

faults: setup  ## what callers are told where a backend fails, fault by stage
	$(BIN)/python -m benchmarks.faults

soak: setup  ## 20,000 requests with cancels, slow readers and a backend that dies: nothing may be left over
	$(BIN)/python -m benchmarks.soak

drain: setup  ## restart routers in turn under load: no request may fail
	$(BIN)/python -m benchmarks.drain

lint: setup  ## ruff, mypy and buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint

protos: setup  ## generate and install the stubs again
	$(BIN)/python -m pip install --quiet -c constraints.txt --force-reinstall --no-deps ./protos

clean:  ## remove what setup made
	rm -rf $(VENV)
