# Everything a newcomer does. `make help` lists the targets.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
CORPUS ?=
KEEP ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint lock format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## set up .venv with pip

# The seconds that installation takes are kept for the demo's report.
$(INSTALLED): pyproject.toml
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "installing into $(VENV) (a few minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --progress-bar off --editable '.[dev]'; \
	echo $$(( $$(date +%s) - start )) > $(VENV)/install-seconds; touch $@

demo: $(INSTALLED) ## run the main job end to end; CORPUS=folder of recordings, KEEP=1 leaves it up
	@$(BIN)/python jobs/demo.py $(if $(CORPUS),--corpus $(abspath $(CORPUS))) $(if $(KEEP),--keep true)

test: $(INSTALLED) ## run the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED) ## run the tests, slow ones included
	@$(BIN)/python -m pytest

lint: $(INSTALLED) ## check format, style and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy platform/mellow_platform jobs serve tests

lock: ## resolve the image's locked packages again
	@infra/image/lock.sh

format: $(INSTALLED) ## put the code into the house format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## delete what runs and installation left
	rm -rf $(VENV) runs
