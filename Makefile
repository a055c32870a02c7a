# Every target sets up what it needs: Python 3.11 and git are enough.
PYTHON ?= python3.11
VENV ?= .venv
SERVICES ?= tests/services
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false

.DEFAULT_GOAL := help
.PHONY: help setup lock retrain plan stack stack-stop deploy check docs format test test-gpu bench-gpu test-services test-all clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Create .venv and install everything from the lock file

$(READY): pyproject.toml requirements.lock requirements-torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	$(BIN)/python -m compileall -q rfdetr flows infra
	touch $@

COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --no-annotate --no-header --python-version 3.11 --quiet
NOT_TORCH := grep -vE '^(torch|torchvision|triton|cuda-[a-z]+|nvidia-(cu|nc|nv[jst])[a-z0-9-]*)=='

lock: ## Resolve the lock files again from pyproject.toml (runtime: what the image installs)
	$(COMPILE) --extra all --constraint requirements-torch.txt | $(NOT_TORCH) > requirements.lock
	$(COMPILE) --extra pipeline --extra kubernetes --constraint requirements-torch.txt --constraint requirements.lock \
		| $(NOT_TORCH) > requirements-runtime.lock

retrain: $(READY) ## The complete pipeline on params.yaml (default: the demo)
	$(BIN)/rfdetr-pipeline retrain

plan: $(READY) ## What would run, and why
	$(BIN)/rfdetr-pipeline plan

stack: $(READY) ## PostgreSQL, S3, MLflow, Prefect and a worker on loopback
	$(BIN)/python -m infra.stack up --detach

stack-stop: $(READY) ## Stop the local stack
	$(BIN)/python -m infra.stack down

deploy: $(READY) ## Apply prefect.yaml to PREFECT_API_URL (GPUS=4 POOL_TYPE=kubernetes)
	$(BIN)/python -m infra.deploy $(if $(GPUS),--gpus $(GPUS)) $(if $(POOL_TYPE),--pool-type $(POOL_TYPE))

check: $(READY) ## Lint, format, types, order of imports, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell rfdetr flows infra tests docs *.md *.yaml *.toml Makefile
	$(BIN)/mypy

docs: $(READY) ## Rewrite docs/parameters.md and docs/cli.md
	$(BIN)/python -m infra.generate_docs

format: $(READY) ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(READY) ## The default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(READY) ## The tests of the detector on a machine with a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "gpu or not slow and not services" tests/gpu tests/unit

bench-gpu: $(READY) ## Every speed goal in one table (PUBLIC=python-with-the-public-package)
	$(BIN)/python tests/benchmarks/bench_goals.py $(if $(PUBLIC),--public "$(PUBLIC)")

test-services: $(READY) ## The tests on real servers (PostgreSQL, S3, MLflow, Prefect, worker)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m services --numprocesses 3 --dist loadfile --no-loadscope-reorder $(SERVICES)

test-all: $(READY) ## Everything: large variants, real servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ""

clean: ## Remove caches (not data, models or state)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
