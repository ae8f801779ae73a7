# Everything a newcomer does. `make help` lists the targets.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# PyPI's torch for Linux comes with CUDA: gigabytes that a machine without an NVIDIA GPU has no use for.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-compile
# pip would spend half of the installation on bytecode, on one core, of modules that the demo does not load. Python
# writes that of a module when it is first loaded, unless this variable is set.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-extended test-all lint docs lock format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed-dev ## set up .venv with pip, for everything

# `demo` is what the demo runs, `dev` what tests and checks need besides. The demo reports the seconds of its part.
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

demo: $(VENV)/installed-demo ## the main job end to end; CORPUS=folder RESUME=1 KEEP=1 OUTPUT=folder PORT=n DASHBOARD_PORT=n
	@$(BIN)/python jobs/demo.py $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(OUTPUT),--output "$(OUTPUT)") \
	    $(if $(PORT),--port $(PORT)) $(if $(DASHBOARD_PORT),--dashboard-port $(DASHBOARD_PORT)) \
	    $(if $(KEEP),--keep true) $(if $(RESUME),--resume true)

test: $(VENV)/installed-dev ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not extended and not slow"

# Chaos tests run one at a time: the nodes of two keep each other from starting on a small machine.
test-extended: $(VENV)/installed-dev ## run second proofs, which leave `make test`; .ci/run runs both
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "extended and not slow" --ignore-glob "tests/test_chaos_*"
	@$(BIN)/python -m pytest -m "extended and not slow" tests/test_chaos_*.py

test-all: $(VENV)/installed-dev ## run all tests, those that take minutes each included
	@$(BIN)/python -m pytest

lint: $(VENV)/installed-dev ## check format, style and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy platform/mellow_platform jobs serve tests

docs: $(VENV)/installed-dev ## build the documentation into runs/site; fails on a broken link
	@$(BIN)/python -m mkdocs build --strict --quiet && echo "runs/site/index.html"

lock: ## resolve the image's locked packages again
	@infra/image/lock.sh

format: $(VENV)/installed-dev ## put the code into the house format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## delete what runs and installation left
	rm -rf $(VENV) runs
