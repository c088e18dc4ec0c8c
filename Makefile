# Everything a person types. A fresh machine needs git, make and python3.11 with venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup install run test check ui clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PINS := constraints.txt constraints-dvc.txt pyproject.toml
PRESET ?=
WORKERS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export DVC_NO_ANALYTICS := 1
export PYTHONDONTWRITEBYTECODE :=  # packages are compiled when first imported, which pip would do for all of them
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'
	@echo "  PRESET=smoke make run    another size: smoke, tiny, small, h200, deepgen-5b"

# The stamp holds the pins and the clone's place: new pins or a moved clone install again, else this is instant.
setup:  ## install what is missing, in .venv and .venv-dvc
	@want="$$(cat $(PINS) | sha256sum | cut -c1-16) $(CURDIR)"; \
	if [ "$$(cat .venv/.stamp 2>/dev/null || true)" != "$$want" ]; then \
	  $(MAKE) --no-print-directory install && echo "$$want" > .venv/.stamp; \
	fi

# DVC has an environment of its own: its antlr pin breaks Dagster's selection strings. The scripts in an environment name its place,
# so a moved one is made anew; one that is a link belongs to somebody else, and is left alone.
install:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3.11 or newer is needed, found $$("$(PYTHON)" -V)"; exit 1; }
	@for folder in .venv .venv-dvc; do \
	  if [ -L $$folder ] || head -n 1 $$folder/bin/pip 2>/dev/null | grep -qF "#!$(CURDIR)/$$folder/"; then continue; fi; \
	  echo "creating $$folder"; \
	  "$(PYTHON)" -m venv --clear $$folder || { echo "venv failed: on Debian, apt install python3.11-venv"; exit 1; }; \
	done
	@echo "installing torch, then the rest, and DVC beside them (two to four minutes)"
	@.venv-dvc/bin/pip install -qq --no-compile -c constraints-dvc.txt dvc & dvc=$$!; \
	.venv/bin/pip install -qq --no-compile "$$(grep '^torch==' constraints.txt)"; \
	.venv/bin/pip install -qq --no-compile -c constraints.txt -e ".[dev]"; \
	wait $$dvc
	@rm -f .venv/bin/dvc
	@printf '%s\n' '#!/bin/sh' '# DVC, whose stages find this environment as `python`.' 'clone="$$(cd "$$(dirname "$$0")/../.." && pwd)"' \
	  'PATH="$$clone/.venv/bin:$$PATH" exec "$$clone/.venv-dvc/bin/dvc" "$$@"' > .venv/bin/dvc && chmod +x .venv/bin/dvc
	@echo "installed"

run: setup  ## data, three training stages, evaluation, export, registry; what is done is skipped
	@if [ -n "$(PRESET)" ]; then .venv/bin/deepgen preset use "$(PRESET)"; fi
	@.venv/bin/deepgen run

test: setup  ## every test, the smoke pipeline included; lists what was skipped and why
	@.venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup  ## format, lint, types, fast tests
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy data model orchestration runtime training
	@.venv/bin/python -m pytest -q -m "not slow"

ui: setup  ## Dagster and MLflow in the browser, on this clone's files
	@.venv/bin/deepgen ui

clean:  ## caches only: outputs, registry and databases stay
	@rm -rf .pytest_cache .ruff_cache .mypy_cache build deepgen.egg-info
	@find . -path ./.venv -prune -o -path ./.venv-dvc -prune -o -path ./outputs -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
