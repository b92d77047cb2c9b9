# `make` prints the targets. Each of them sets the environment up first, when it is missing or stale.

PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
NO_PYTHON := clinfuse needs Python 3.11 or newer with its venv module, and none runs here as \
	python3.13, python3.12, python3.11 or python3: install one, or say make PYTHON=/path/to/python.

BIN := .venv/bin
PY := $(BIN)/python
INSTALLED := $(BIN)/.installed
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt
NOW := $(shell date +%Y-%m-%d_%H-%M-%S)

# One thread a test process: pytest-xdist runs several, and they would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --jaxtyping-packages=clinfuse,beartype.beartype \
	--numprocesses=auto --maxprocesses=4 --dist=worksteal

# In an order in which two at a time seldom wait for one another's training.
SWEEPS := steps methods components jitter eta uncertainty reference parameterisation ct_map seeds \
	weights weights_grid masks members guidance_search
SCALE := small

.PHONY: help install demo test test-all smoke tables bench notebooks lint types clean
.DEFAULT_GOAL := help

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1:\2/p' $(MAKEFILE_LIST) \
		| while IFS=: read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

install: $(INSTALLED)  ## make .venv with the pinned versions (a few minutes, once)

# Made anew rather than updated, so that nothing lingers that constraints.txt no longer names.
# piq and netcal (second opinions in tests) come without what they ask for: a torchvision for another torch
# breaks torchmetrics and lightning on import. So does dynamic-network-architectures (nnU-Net heads).
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@echo "Installing into .venv: a few minutes the first time."
	@$(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) --editable '.[dev,test]'
	@$(PIP_INSTALL) --no-deps dynamic-network-architectures netcal piq
	@touch $@

demo: FOLDER := runs/demo/$(NOW)
demo: $(INSTALLED)  ## train on phantoms, compare with the baselines, write the report
	$(PY) -m clinfuse.train experiment=demo hydra.run.dir=$(FOLDER)/clinfuse
	$(PY) -m clinfuse.train experiment=demo method=deterministic_unet trainer.max_epochs=4 \
		hydra.run.dir=$(FOLDER)/deterministic_unet
	$(PY) -m clinfuse.evaluate run=[$(FOLDER)/clinfuse,$(FOLDER)/deterministic_unet] \
		baselines=[average,weighted,maximum,mask_composite] \
		misregistration_mm=[0,1,2,4] hydra.run.dir=$(FOLDER)

test: $(INSTALLED)  ## run the tests that need neither patience nor a GPU
	$(PYTEST) -m "not slow and not gpu and not cluster"

test-all: $(INSTALLED)  ## run every test, the slow and the GPU ones too
	$(PYTEST)

smoke: $(INSTALLED)  ## train every method a few steps and fuse: volumes, grey and coloured slices
	$(PY) experiments/smoke/run.py runs/smoke

tables: $(INSTALLED)  ## run every sweep of conf/sweep, two at a time, and write its tables: goes on where it stopped
	printf '%s\n' $(SWEEPS) | OMP_NUM_THREADS=1 xargs -P 2 -I NAME $(PY) -m clinfuse.train -m sweep=NAME scale=$(SCALE)

bench: $(INSTALLED)  ## time everything beside public references: a table, a JSON and a plot (twelve minutes)
	$(PY) experiments/performance/bench.py --out runs/bench/$(NOW)

notebooks: $(INSTALLED)  ## execute every notebook from top to bottom
	$(PYTEST) tests/notebooks -m "not slow"

lint: $(INSTALLED)  ## check style, formatting and the layers
	$(BIN)/ruff check --output-format=concise
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

clean:  ## remove caches and build leftovers, keep .venv and runs
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
