# `make run` and `make test` set everything up on a fresh machine; the plain pip commands stand in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE

# torch first and alone: a plain `torch` would bring the CUDA build; the constraints pin the rest to what was tested.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# What the tests need beyond what a run needs.
$(VENV)/installed: $(VENV)/base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,text,detection,export,completion]"
	touch $@

.PHONY: install run test test-all check lint types imports bench clean

install: $(VENV)/installed

run: $(VENV)/base
	$(BIN)/python -m repro.run --gin gin/sdtps_rgbnt.gin

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

check: lint types imports test

bench: install
	missed=0; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || missed=1; done; exit $$missed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .hypothesis
