# make demo   train, evaluate and sample a small model in about five minutes
# make test   lint, types and tests
# make gpu    what only a GPU can show: the tests marked `gpu`, then bench/gpu.py
# Both create .venv and install on their first run only; the stamp file makes later runs cheap.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-slow gpu bench lint

demo: $(STAMP)
	$(BIN)/metastate demo

test: lint
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python bench/gpu.py

bench: $(STAMP)
	@set -e; for script in $(filter-out bench/gpu.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[cli,dev]' -c constraints.txt
	touch $@
