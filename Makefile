# Everything a contributor runs. `make` alone lists the targets.

# A name that a version manager only pretends to have is skipped: each candidate must start and be able to make a venv.
PYTHON ?= $(shell for candidate in python3.13 python3.12 python3.11 python3; do \
	"$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$candidate"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes at once; each has a PostgreSQL to talk to. More than processors: much of what a test does is to wait.
WORKERS ?= 3
# What `make test` runs, and more options for pytest.
TESTS ?= tests
PYTEST_ARGS ?=
# For `make bench`: some scenarios only, and options of `python -m benchmarks` (--save, --out DIR).
SCENARIOS ?=
BENCH_ARGS ?=
# For `make chaos`: how long faults are injected, and more options of `python -m tests.chaos`; for `make chaos-mutants`:
# only these. For `make restarts`: only these cells.
CHAOS_SECONDS ?= 60
CHAOS_ARGS ?=
MUTANTS ?=
CELLS ?=
# For `make sim`: how many fresh seeds to run, or for how long, or the one to replay step by step.
SEEDS ?= 100
SIM_SECONDS ?=
SEED ?=
# For `make lock`: --upgrade, or --upgrade-package NAME.
LOCK_ARGS ?=

CHECKED := client server agent tests proto examples benchmarks
DEPENDENCIES := $(VENV)/.dependencies
READY := $(VENV)/.ready

# The tools are those of the environment, whatever is activated outside.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make .venv from the hash-pinned lock (PYTHON=python3.x chooses)
	@echo "$(VENV) is ready: $$($(BIN)/python --version)"

$(DEPENDENCIES): requirements/dev.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: install one, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing requirements/dev.txt (hashes checked)"
	@$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

$(READY): $(DEPENDENCIES) pyproject.toml
	@echo "installing lessor, editable"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: demo
demo: $(READY) ## Train on two agents, kill one halfway, watch the other resume
	@$(BIN)/python examples/demo.py

.PHONY: test
test: $(READY) ## Run all tests (TESTS=path, WORKERS=n, PYTEST_ARGS=…)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS) $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: $(READY) ## Run the unit tests, under 20 seconds
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/unit $(PYTEST_ARGS)

.PHONY: bench
bench: $(READY) ## Run all benchmarks, peers included (SCENARIOS="drain growth", BENCH_ARGS="--out DIR")
	@$(BIN)/python -m benchmarks.peers
	@$(BIN)/python -m benchmarks $(SCENARIOS) $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: $(READY) ## Run the quick benchmarks, under a minute once their peers are installed
	@$(BIN)/python -m benchmarks.peers --quick
	@$(BIN)/python -m benchmarks --quick $(SCENARIOS) $(BENCH_ARGS)

.PHONY: chaos
chaos: $(READY) ## Real processes under faults (CHAOS_SECONDS=1800, CHAOS_ARGS="--seed 7"; needs root)
	@$(BIN)/python -m tests.chaos --seconds $(CHAOS_SECONDS) $(CHAOS_ARGS)

.PHONY: chaos-mutants
chaos-mutants: $(READY) ## Plant bugs in a copy; the checker must catch each (MUTANTS="no-margin …")
	@$(BIN)/python -m tests.chaos --mutants $(MUTANTS)

.PHONY: restarts
restarts: $(READY) ## Restart every part in every way under 50 jobs (CELLS='"agent KILL"', CHAOS_ARGS="--away 600")
	@$(BIN)/python -m tests.chaos --restarts $(CELLS) $(CHAOS_ARGS)

.PHONY: sim
sim: $(READY) ## Simulate faults in virtual time on a real PostgreSQL (SEEDS=1000, SIM_SECONDS=180, or SEED=7 to replay one)
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),$(if $(SIM_SECONDS),--seconds $(SIM_SECONDS),--seeds $(SEEDS)))

.PHONY: sim-mutants
sim-mutants: $(READY) ## Plant bugs; count the seeds until the simulation finds each (MUTANTS="margin-skipped …")
	@$(BIN)/python -m tests.simulation --mutants $(MUTANTS)

.PHONY: model
model: $(READY) ## Search every state of the model of the lease protocol, and its planted bugs
	@$(BIN)/python -m tests.model

CONFORMANCE := build/conformance.json

# All but the test of the table that is about to be written.
.PHONY: conformance
conformance: $(READY) ## Hold every runtime to the suite; write the table of docs/runtimes.md
	@mkdir -p $(dir $(CONFORMANCE))
	@LESSOR_PLANTED_FAULTS=1 $(BIN)/python -m pytest -p lessor_agent.testing.conformance.plugin --conformance-report $(CONFORMANCE) \
		-n $(WORKERS) --dist worksteal tests/conformance --ignore=tests/conformance/test_page.py $(PYTEST_ARGS)
	@$(BIN)/python -m lessor_agent.testing.conformance.table $(CONFORMANCE) --page docs/runtimes.md

.PHONY: check
check: $(READY) ## Lint, format, types, layers, contract
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory verify

.PHONY: fmt
fmt: $(READY) ## Format code and contract, apply safe fixes
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)
	@$(BIN)/buf format --write

.PHONY: generate
generate: $(READY) ## Generate client/lessor/v1 from proto/
	@$(BIN)/python proto/generate.py

.PHONY: verify
verify: $(READY) ## Check generated code for drift; buf lint, format, breaking
	@$(BIN)/python proto/generate.py --check
	@$(BIN)/python proto/verify.py

.PHONY: lock
lock: $(READY) ## Resolve pyproject.toml into requirements/*.txt (LOCK_ARGS=--upgrade)
	@$(LOCK) --extra server --extra agent --extra examples --extra bench --extra dev --output-file requirements/dev.txt
	@$(LOCK) --extra server --constraint requirements/dev.txt --output-file requirements/server.txt
	@$(LOCK) --extra agent --constraint requirements/dev.txt --output-file requirements/agent.txt

# One resolution for every platform and every Python from 3.11 on, naming no host.
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --no-emit-build-options $(LOCK_ARGS)

.PHONY: clean
clean: ## Remove .venv and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find $(CHECKED) -name __pycache__ -prune -exec rm -rf {} +
