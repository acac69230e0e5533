# `make demo` and `make test` set everything up themselves, in .venv, from Python, pip and make alone. The pip
# that comes with a Python takes twice as long to resolve, and compiles on one core.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where it is set, each of the many processes of a run compiles our sources again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-all chaos lint types clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true # some are of other Pythons
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
