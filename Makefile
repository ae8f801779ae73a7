# Commands for development. `make help` lists the targets.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# PyPI's torch for Linux contains CUDA: gigabytes that a machine without an NVIDIA GPU cannot use.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-compile
# --no-compile: pip would spend half of the installation on bytecode, on one core, of modules that the demo does not
# import. Python writes a module's bytecode at its first import, unless this variable is set.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-extended test-all lint docs lock format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed-dev ## install everything into .venv with pip

# Extra `demo`: packages of the demo, which reports the seconds of their installation; `dev` adds tests and checks.
$(VENV)/installed-%: pyproject.toml
	@set -e; start=$$(date +%s); \
	$(PYTHON) platform/mellow_platform/doctor.py --before-install; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "Installing into $(VENV); the first time takes one to three minutes."; \
	if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! $(BIN)/python -m pip show --quiet torch 2> /dev/null \
	    && $(BIN)/python -c 'from urllib.request import urlopen; urlopen("$(CPU_TORCH)/torch/", timeout=3)' 2> /dev/null; then \
	    torch=$$($(BIN)/python -c 'import tomllib; print(next(name for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if name.startswith("torch>")))'); \
	    $(PIP_INSTALL) --index-url $(CPU_TORCH) "$$torch"; \
	fi; \
	$(PIP_INSTALL) --editable '.[$*]'; \
	if [ $* = dev ]; then \
	    $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true; touch $(VENV)/installed-demo; \
	fi; \
	echo $$(( $$(date +%s) - start )) > $(VENV)/install-seconds; touch $@

demo: $(VENV)/installed-demo ## run the main job end to end; CORPUS=folder RESUME=1 KEEP=1 OUTPUT=folder PORT=n DASHBOARD_PORT=n
	@$(BIN)/python jobs/demo.py $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(OUTPUT),--output "$(OUTPUT)") \
	    $(if $(PORT),--port $(PORT)) $(if $(DASHBOARD_PORT),--dashboard-port $(DASHBOARD_PORT)) \
	    $(if $(KEEP),--keep true) $(if $(RESUME),--resume true)

test: $(VENV)/installed-dev ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not extended and not slow"

# Chaos tests run one at a time: on a small machine, nodes of two clusters slow each other's start beyond Ray's timeout.
test-extended: $(VENV)/installed-dev ## run the tests that `make test` omits as second proofs; .ci/run runs both
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "extended and not slow" --ignore-glob "tests/test_chaos_*"
	@$(BIN)/python -m pytest -m "extended and not slow" tests/test_chaos_*.py

test-all: $(VENV)/installed-dev ## run all tests, including those that take minutes each
	@$(BIN)/python -m pytest

lint: $(VENV)/installed-dev ## check format, style and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy platform/mellow_platform jobs serve tests

docs: $(VENV)/installed-dev ## build the documentation into runs/site; fails on a broken link
	@$(BIN)/python -m mkdocs build --strict --quiet && echo "runs/site/index.html"

lock: ## update the lock files of the image
	@infra/image/lock.sh

format: $(VENV)/installed-dev ## format the code, and fix lint errors
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## delete .venv and runs
	rm -rf $(VENV) runs
