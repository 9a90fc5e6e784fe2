# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up what they need.

PYTHON ?= python3
VENV ?= .venv
# More for the tools behind a target: make test ARGS="-k quorum -x", make bench ARGS=--quick
ARGS ?=
# Examples per property in `make fuzz`, and how long broken images are used.
EXAMPLES ?= 20000
SECONDS ?= 60

export PYTHON VENV

BIN := $(VENV)/bin
RUN := $(VENV)/.run-ready
DEV := $(VENV)/.dev-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTHON=python3.13  the interpreter      VENV=DIR  the environment (.venv)'
	@echo '  PEERS=no           install no packages  ARGS=...  more for the tool behind the target'

setup: ## make the environment and, as root, install the peers of the tests
	@tools/setup dev

demo: $(RUN) ## a pair on this machine: writes, checkpoints, SIGKILL, failover, the proof
	@$(BIN)/blockstep demo $(ARGS)

test: $(DEV) ## the whole test suite; what cannot run here is skipped and says why
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(DEV) ## ruff, mypy --strict, and the layers of the imports
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_layers.py

bench: $(DEV) ## blockstep beside QEMU, qemu-nbd and nbdkit, in turn; ratios and targets
	@$(BIN)/python -m benchmarks $(ARGS)

fuzz: $(DEV) ## broken images for SECONDS=60; every property test with many examples: EXAMPLES=20000
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)
	@HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -m hypothesis --timeout=0 $(ARGS)

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): pyproject.toml requirements.lock tools/setup
	@tools/setup run

$(DEV): pyproject.toml requirements.lock requirements-dev.lock tools/setup
	@tools/setup dev
