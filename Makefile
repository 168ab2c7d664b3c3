# Everything runs in .venv, which `make env` creates; nothing else needs to be installed by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help env demo test lint docs reproduce bench clean

help:
	@echo "make demo   turn a real model into an MPOE model, fine-tune and compare (about 7 minutes)"
	@echo "make test   run the tests but the slow ones (about 7 minutes; ARGS='-m \"\"': all)"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the site: tutorials, recipes, explanations, reference (about four minutes)"
	@echo "make bench  everything beside its peers, on one page (half an hour; ARGS=--quick: minutes)"
	@echo "make reproduce  the experiments: hours, resumable (ARGS=--quick: 12 minutes)"
	@echo "make env    only create the environment in $(VENV)"
	@echo "make clean  remove $(VENV), demo-output and docs/_build, with all that they hold"

env: $(READY)

# Made anew only when what it is made from changes.
$(READY): pyproject.toml requirements/constraints.txt requirements/data.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tnmoe needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[all,test,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --requirement requirements/data.txt
	touch $@

demo: env
	$(BIN)/tnmoe demo --output demo-output --overwrite $(ARGS)

# ARGS='-m ""' adds the slow ones, ARGS='-m "" --cov' also measures which lines they run.
test: env
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile -m "not slow" $(ARGS)

# ARGS=--quick or none; for other options call the scripts (benchmarks/README.md).
bench: $(VENV)/.bench
	$(BIN)/python -W ignore benchmarks/algebra.py $(ARGS)
	$(BIN)/python -W ignore benchmarks/experts.py $(ARGS)
	$(BIN)/python benchmarks/paper_sizes.py --json benchmarks/results/paper_sizes.json
	$(BIN)/python benchmarks/report.py $(ARGS)

$(VENV)/.bench: $(READY) requirements/bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --requirement requirements/bench.txt
	touch $@

# Goes on where it was stopped. ARGS=--quick: minutes; --text OLD NEW: other texts.
reproduce: env
	$(BIN)/python -m experiments $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. Pages run on all cores; those whose code and library did not change are not run again.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --jobs auto --fail-on-warning --keep-going --quiet $(ARGS) docs docs/_build/html
	$(BIN)/python -m pytest --quiet docs/test_site.py
	@echo "open docs/_build/html/index.html"

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo-output docs/_build
