# A fresh machine needs Python 3.11 or newer, pip and make; nothing else.
#
#   make demo    a run that is killed and resumed, and what became of it
#   make test    the tests, once for each of BACKENDS
#   make check   formatting, lint, types
#   make bench   the benchmarks
#   make docs    runs the Python of README.md and docs/, checks their links
#   make install the development environment in $(VENV)

PYTHON ?= python3
VENV ?= .venv
BACKENDS ?= jax tensorflow torch

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo install test check bench docs

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

install: $(VENV)/.dev

test: $(VENV)/.dev
	set -e; for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend $(BIN)/pytest -n 3 --dist worksteal; \
	done

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.bench
	set -e; for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/engine.py; \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/fit.py; \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/data.py; \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/checkpoints.py; \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/speed; \
	done

docs: $(VENV)/.dev
	$(BIN)/pytest tests/test_docs.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"legato needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# The demo needs no development tools, and is not made to wait for them.
$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[jax,digits]'
	touch $@

$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[jax,digits,dev]' tensorflow-cpu torch
	touch $@ $(VENV)/.demo

# Others to be measured beside, which nothing else needs.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -c constraints.txt -e '.[bench]'
	touch $@
