# `make help` lists the targets. The first one that needs it creates .venv and installs the stack of this machine.
.DEFAULT_GOAL := help
.PHONY: help train test quality clean
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,12))' 2>/dev/null && echo $$p && break; done)
# an empty CUDA_VISIBLE_DEVICES, -1 and Slurm's NoDevFiles: a CPU on purpose
STACK := $(shell case "$${CUDA_VISIBLE_DEVICES-all}" in (""|-1|NoDevFiles) echo cpu;; (*) nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu;; esac)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(STACK)
# the recipe's two ranks need no GPU; with one they share it
CONFIG := accelerate_configs/$(if $(filter gpu,$(STACK)),zero3_1gpu,zero3_cpu_2proc).yaml
# said here, DeepSpeed and torch need not guess aloud
export OMP_NUM_THREADS ?= 1
ifeq ($(STACK),cpu)
export DS_ACCELERATOR ?= cpu
endif

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

train: $(STAMP) ## install if needed, then train the embedded tiny model (runs/tiny, about 5 minutes)
	$(BIN)/accelerate launch --quiet --config_file $(CONFIG) recipes/grpo_justrl.py

test: $(STAMP) ## install if needed, then run all tests that this machine can run
	$(BIN)/python -m pytest

quality: $(STAMP) ## check style with ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check --diff .

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

$(STAMP): setup.cfg pyproject.toml
	@bash .ci/install "$(PYTHON)" "$(VENV)" "$(STACK)"
	@touch $@
