# `make demo` and `make test` set everything up themselves, in .venv, from Python, pip and make alone. The pip
# that comes with a Python takes twice as long to resolve; most of what is installed is never imported, so that
# Python compiles what is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all chaos lint types clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/cvt-pipeline demo

test: setup
	CVT_TEST_KILLS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30 -m "not slow"

# Every test, and ten kills instead of one. One after the other: the slow ones bring up clusters, and two at a
# time on two cores run into their own time limits.
test-all: setup
	CVT_TEST_KILLS=10 $(BIN)/python -m pytest

# Fifty kills at random moments, and a look at the output after each; an hour.
chaos: setup
	$(BIN)/python -m tests.chaos --kills 50

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output
