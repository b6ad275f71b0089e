# Each target makes .venv when it is missing and installs what it needs; later calls find it there.
#
#   make quickstart                    from nothing to a model you can talk to
#   make quickstart ARGS="--pattern mamba2"
#   make test                          the test suite
#   make venv PYTHON=python3.12        another Python (3.10 or newer)
#   make test PIP_ARGS="--index-url …" other options for pip, such as a mirror or an index of CPU-only torch
#   make venv PIP="uv pip"             install with uv

PYTHON ?= python3
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip
PIP_ARGS ?=
ARGS ?=
BENCHMARKS ?= $(basename $(notdir $(shell grep -l __main__ benchmarks/*.py)))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help quickstart test test-slow venv check bench docs clean

help:
	@echo "make quickstart   train a small chat model from nothing, evaluate it, write a report"
	@echo "make test         run the tests"
	@echo "make test-slow    run the tests that take long"
	@echo "make venv         only make $(VENV), with everything for development"
	@echo "make check        ruff, mypy, import-linter"
	@echo "make bench        run the benchmarks (BENCHMARKS=\"train decode\" chooses)"
	@echo "make docs         check links, commands and code blocks of the documentation"
	@echo "make clean        remove caches and build products; keeps $(VENV) and out/"

quickstart: $(VENV)/.stamp-core
	@$(VENV)/bin/nanochat quickstart $(ARGS)

test: $(VENV)/.stamp-dev
	@$(VENV)/bin/python -m pytest $(ARGS)

test-slow: $(VENV)/.stamp-dev
	@$(VENV)/bin/python -m pytest -m slow $(ARGS)

venv: $(VENV)/.stamp-dev

check: $(VENV)/.stamp-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

bench: $(VENV)/.stamp-dev
	@for name in $(BENCHMARKS); do $(VENV)/bin/python -m benchmarks.$$name || exit 1; done

docs: $(VENV)/.stamp-dev
	@$(VENV)/bin/python -m pytest tests/test_docs.py tests/test_commands.py $(ARGS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find nanochat scripts tests benchmarks configs examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says what is installed; it is older than pyproject.toml when that changed.

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "nanochat needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -f $(VENV)/bin/python; echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# $(1): the extras to install, such as [dev]. pip's words go to a log, shown only when it fails.
define install
	@echo "installing nanochat$(1) into $(VENV)"
	@$(PIP) install $(PIP_ARGS) -e '.$(1)' > $(VENV)/install.log 2>&1 || \
		{ cat $(VENV)/install.log >&2; echo "the installation failed; its log is $(VENV)/install.log" >&2; exit 1; }
	@touch $@
endef

$(VENV)/.stamp-core: pyproject.toml | $(VENV)/bin/python
	$(call install,)

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,[dev])
	@touch $(VENV)/.stamp-core
