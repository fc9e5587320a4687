# Each target does its own set-up in .venv; a second call finds it done. Needs Python 3.11 or newer, with venv.
#   make quickstart   the whole recipe on real data, without a GPU
#   make test         the tests, without the long proofs
#   make test-full    the long proofs: every pair of layouts, kills and other faults, memory
#   make test-faults  of these the faults alone
#   make test-slurm   the batch scripts on a SLURM cluster of this machine; as root on Debian it installs SLURM
#
# FAULT_KILLS=... kills that test-full and test-faults make, 32 by default; 200 take a quarter of an hour more
# PYTHON=...      interpreter to build .venv with
# PIP_ARGS=...    more options for pip, such as another index for torch
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(shell command -v $(name))))
PYTHON_312 ?= python3.12
PIP_ARGS ?=
PYTEST_ARGS ?=
FAULT_KILLS ?= 32

VENV := .venv
BIN := $(VENV)/bin
DATA := data/quickstart

# What each environment needs beyond the package itself.
EXTRAS_quickstart := quickstart,report
EXTRAS_test := dev,quickstart,report,tracking
EXTRAS_lint := dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart quickstart-short quickstart-data test test-full test-faults test-slurm test-312 lint format clean

help:
	@sed -n '2,/^SHELL/{/^#/s/^# \{0,1\}//p}' Makefile

# .ready-<set> is written when the extras of that set are installed.
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "-- installing nemo_align[$(EXTRAS_$*)] into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS_$*)]'
	@touch $@

$(BIN)/python:
	@echo "-- creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"nemo_align needs Python 3.11 or newer, not {sys.version.split()[0]}: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(DATA)/manifest.json: $(wildcard tools/quickstart_data.py tools/quickstart/*.py) | $(VENV)/.ready-quickstart
	@$(BIN)/python tools/quickstart_data.py --output $(DATA)

quickstart-data: $(DATA)/manifest.json

quickstart: $(VENV)/.ready-quickstart $(DATA)/manifest.json
	$(BIN)/nemo-align pipeline +experiment=quickstart/recipe
	@$(BIN)/python tools/check_quickstart.py runs/quickstart/recipe

# Every stage and hand-off of the recipe, four steps each, from the start each time.
quickstart-short: $(VENV)/.ready-quickstart $(DATA)/manifest.json
	@rm -rf runs/quickstart/short
	$(BIN)/nemo-align pipeline +experiment=quickstart/short

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m 'not full' $(PYTEST_ARGS)

test-full: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m full $(PYTEST_ARGS)

test-full test-faults: export NEMO_ALIGN_FAULTS_KILLS := $(FAULT_KILLS)

# Kills, signals, full disks, damaged checkpoints and frozen ranks under real runs: a part of test-full.
test-faults: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m full tests/faults tests/end_to_end/test_resume.py tests/end_to_end/test_pipeline_chain.py $(PYTEST_ARGS)

# SLURM's own daemons, as two nodes on this machine; they end with the tests. One test is quickstart-short as jobs.
test-slurm: $(VENV)/.ready-test $(DATA)/manifest.json
	@tools/install_slurm.sh
	$(BIN)/python -m pytest -m full tests/slurm $(PYTEST_ARGS)

# The other end of the supported range: megatron-core 0.19 needs Python 3.12.
test-312:
	$(MAKE) test VENV=.venv-312 PYTHON=$(PYTHON_312) PIP_ARGS='$(PIP_ARGS)' PYTEST_ARGS='$(PYTEST_ARGS)'

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.ready-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-312 build dist .pytest_cache .ruff_cache .import_linter_cache
