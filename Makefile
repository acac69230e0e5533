# `make demo` and `make test` set everything up themselves, in .venv, from Python, pip and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint types clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/cvt-pipeline demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Every test, and five kills instead of two.
test-all: setup
	CVT_TEST_KILLS=5 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output
