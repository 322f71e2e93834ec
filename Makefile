# Every target sets up what it needs: `make demo` and `make test` each work alone on a machine with Python 3.11 and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PAGE := $(VENV)/.installed-page
ARGS ?=

# `make smoke` trains these in order: each reads the run folders of those before it.
STAGES := vae clip ldm controlnet
TINY := configs/train/tiny

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo page test test-long test-ranks test-all test-faults test-browser fmt docs lint types smoke check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | while IFS=$$'\t' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## create .venv and install everything (once; again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@if ! [ -x $(PY) ]; then \
		for candidate in python3.11 python3; do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then echo 'no Python 3.11 or later on PATH; install python3.11 (with venv)' >&2; exit 2; fi; \
		echo "creating $(VENV) with $$found"; \
		$$found -m venv $(VENV); \
	fi
	@echo 'installing into $(VENV) (PyTorch is large: a few minutes the first time)'
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[data,test]'
	@touch $@

demo: setup ## one grid of every adapter that ships, then train a small ControlNet and draw with it (under three minutes)
	@$(PY) scripts/tour.py $(ARGS)

$(PAGE): $(STAMP)
	@echo 'installing the web page into $(VENV)'
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,browser]'
	@touch $@

page: $(PAGE) ## the web page, on this machine only (ARGS=... are passed to scripts/demo.py)
	$(PY) scripts/demo.py $(ARGS)

test: setup ## fast tests on the CPU, without network, two at a time (ARGS=... is passed to pytest)
	$(PY) -m pytest -n 2 $(ARGS)

test-long: setup ## the tests that take longer, two at a time
	$(PY) -m pytest -n 2 -m 'long and not slow and not ranks' $(ARGS)

test-ranks: setup ## trainings in two processes against one
	$(PY) -m pytest -m 'ranks and not slow' $(ARGS)

test-all: setup ## all of them but the page's: the slow ones, and the GPU ones where there is a GPU
	$(PY) -m pytest -m 'not network and not browser' $(ARGS)

test-faults: setup ## kill trainings 50 times at random moments and compare what comes out (minutes; FAULT_KILLS=N)
	$(PY) -m pytest -m slow tests/faults $(ARGS)

test-browser: $(PAGE) ## the web page in a real browser: wants Debian's packages chromium and chromium-driver
	$(PY) -m pytest -m browser tests/browser $(ARGS)

fmt: setup ## format and apply the safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup ## write docs/config.md, the reference of every config key, anew from the code
	$(PY) scripts/document.py

lint: setup ## ruff, without changing anything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup ## pyright
	$(PY) -m pyright --pythonpath $(PY)

# The runs of `make smoke` read each other's weights here instead of runs/tiny.
SMOKE := .smoke
SMOKE_WEIGHTS_ldm := model.vae.weights=$(SMOKE)/vae model.text.weights=$(SMOKE)/clip
SMOKE_WEIGHTS_controlnet := $(SMOKE_WEIGHTS_ldm) model.unet.weights=$(SMOKE)/ldm

smoke: setup ## every script end to end in .smoke/, a few steps each
	@rm -rf $(SMOKE)
	@$(foreach stage,$(STAGES),echo '== smoke: train $(stage)'; $(PY) scripts/train.py --config $(TINY)/$(stage).yaml \
		train.steps=4 data.length=64 run.dir=$(SMOKE)/$(stage) $(SMOKE_WEIGHTS_$(stage));)
	@echo '== smoke: sample tiny'
	@$(PY) scripts/sample.py --config configs/sample/tiny/controlnet.yaml out.dir=$(SMOKE)/outputs/tiny \
		$(SMOKE_WEIGHTS_controlnet) adapters.edge.weights=$(SMOKE)/controlnet
	@echo '== smoke: every ablation'
	@$(PY) scripts/ablate.py --config configs/ablation budget=smoke --out $(SMOKE)/ablation
	@echo '== smoke: dry run at SD1.5 size'
	@$(PY) scripts/train.py --config configs/train/sd15/controlnet_canny.yaml --dry-run
	@echo '== smoke: sample with the weights that ship'
	@$(PY) scripts/sample.py out.dir=$(SMOKE)/outputs/emoji

check: lint types test test-long test-ranks ## what has to pass before a commit lands

clean: ## remove caches and builds (keeps .venv, runs/, outputs/, data/)
	@rm -rf .smoke build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
