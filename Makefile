# `make help` lists what there is. PYTHON=python3 takes the machine's own python instead of .venv;
# BASE_PYTHON is the one that .venv is made with.

VENV := .venv
PYTHON ?= $(VENV)/bin/python
BASE_PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
CONFIG ?= cpu-128k
NPROC ?= 2
THREADS ?= 1
WORKERS ?= 2
GPU_TEST_SECONDS ?= 200
GPU_BENCH_SECONDS ?= 240
ARGS ?=

INSTALLED := $(VENV)/.installed
BENCHMARKS := $(filter-out common,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))
# only these files, so that a machine's own python needs no more packages than they do
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)
SETUP := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(INSTALLED))

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-slow test-all lint types imports bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# DS_BUILD_OPS=0: DeepSpeed, which comes as source, compiles nothing, so that no compiler is needed
setup: $(INSTALLED) ## make .venv and install everything into it; happens by itself, once

$(INSTALLED): pyproject.toml $(wildcard $(CONSTRAINTS))
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(BASE_PYTHON) is missing or older than Python 3.11;" \
	    "name a newer one, for instance make setup BASE_PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(BASE_PYTHON) has no working venv module;" \
	    "install it (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	@touch $@

pretrain: $(SETUP) ## train: CONFIG=cpu-128k NPROC=2 THREADS=1, more in ARGS="--overwrite --verify --steps 4"
	OMP_NUM_THREADS=$(THREADS) $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(NPROC) \
	  -m launch.pretrain $(if $(findstring --resume,$(ARGS)),,--config $(CONFIG)) $(ARGS)

test: $(SETUP) ## the tests, without the slow ones, in two processes: WORKERS=2
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(SETUP) ## the slow tests alone, in two processes too; ARGS=--soak: the longest, too, and chance tried more often
	$(PYTHON) -m pytest --run-slow -m slow -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(SETUP) ## all tests but a soak's, in one go
	$(PYTHON) -m pytest --run-slow -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(SETUP) ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(SETUP) ## mypy
	$(PYTHON) -m mypy

imports: $(SETUP) ## the directions of import
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

bench: $(SETUP) ## the benchmarks that run on a CPU; results under benchmarks/results
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.$$name; done

# Under eight minutes in all. Whichever ends first, or fails, does not keep the other from running. An interrupt lets
# pytest say what it has found; the benchmark keeps its time itself, and its JSON after every row.
gpu: $(SETUP) ## where there is a GPU: its tests (200 s), then its benchmark (240 s); elsewhere the benchmark's code, dry
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  failed=0; set -x; \
	  timeout -s INT -k 10 $(GPU_TEST_SECONDS) $(PYTHON) -m pytest -o addopts=-q --durations 10 \
	    -W ignore::pytest.PytestConfigWarning -m gpu $(GPU_TESTS) $(ARGS) || failed=1; \
	  timeout -k 10 $$(($(GPU_BENCH_SECONDS) + 20)) $(PYTHON) -m benchmarks.gpu --seconds $(GPU_BENCH_SECONDS) || failed=1; \
	  exit $$failed; \
	else \
	  echo "no GPU here (torch sees no CUDA device): its tests and figures want one; whether its benchmark runs:"; \
	  OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.gpu --dry; \
	fi

clean: ## remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
