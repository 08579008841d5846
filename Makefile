# make demo   train, evaluate and sample a small model in about five minutes
# make test   lint, types and tests
# make explore   the property tests on other examples than `make test` takes
# make gpu    what only a GPU can show: the tests marked `gpu`, then bench/gpu.py (with OPTIONS); where
#             a Python elsewhere has all it needs, `make gpu DEV= BIN=/its/bin` installs nothing
# All create .venv and install on their first run only; stamp files make later runs cheap. The demo
# needs little; the tests need the extras that they test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEV := $(VENV)/installed-dev

.PHONY: demo test test-slow explore gpu bench lint

demo: $(STAMP)
	$(BIN)/metastate demo

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow

explore: $(DEV)
	$(BIN)/python -m pytest -m 'hypothesis and not slow and not gpu' --hypothesis-profile=explore

gpu: $(DEV)
	@export PYTHONPATH=src; status=0; $(BIN)/python bench/fla_ready.py || status=$$?; \
	$(BIN)/python -m pytest -m gpu -n 8 -rs $$(grep -rl --include='test_*.py' mark.gpu tests) || \
	status=$$?; $(BIN)/python bench/gpu.py $(OPTIONS) || status=$$?; exit $$status

bench: $(DEV)
	@set -e; for script in $(filter-out bench/fla_ready.py bench/gpu.py bench/load.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[cli]' -c constraints.txt
	touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[cli,dev]' -c constraints.txt
	touch $@
