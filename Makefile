# Everything runs in .venv, which `make env` creates. Nothing needs to be installed by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help env demo test test-jax coverage lint docs reproduce bench gpu clean

help:
	@echo "make demo   turn a real model into an MPOE model, fine-tune and compare it (about 7 minutes)"
	@echo "make test   run all tests except the slow ones (about 7 minutes; ARGS='-m \"not jax\"': those too)"
	@echo "make test-jax  run the property tests of the algebra with JAX's arrays (half an hour)"
	@echo "make coverage  run all tests, and measure the lines that they run (an hour)"
	@echo "make lint   run ruff and mypy"
	@echo "make docs   build the site: tutorials, how-tos, explanations, reference (about 4 minutes)"
	@echo "make bench  compare speed and errors with other libraries (half an hour; ARGS=--quick: minutes)"
	@echo "make gpu    test and time the layers on a GPU (at most 8 minutes; ARGS=--tiny: try it on a CPU)"
	@echo "make reproduce  run the experiments (hours, resumable; ARGS=--quick: 12 minutes)"
	@echo "make env    create the environment in $(VENV), and nothing else"
	@echo "make clean  remove $(VENV), demo-output and docs/_build with all their contents"

env: $(READY)

# Created again only when one of these files changes.
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

# ARGS='-m "not jax"' adds the slow tests, and ARGS='-m ""' those on JAX as well.
# Files keep their order. By default those with the fewest tests come last, and the longest are
# among them: one process then works alone for minutes.
test: env
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder -m "not slow and not jax" $(ARGS)

# With few examples: JAX compiles for every new shape.
test-jax: env
	HYPOTHESIS_PROFILE=compiled TNMOE_TEST_BACKEND=tnmoe.backends.jax $(MAKE) test \
		ARGS='-m "" -k "not numpy and not torch" tests/test_decompose.py tests/test_mpo.py \
		tests/test_combine.py tests/test_shared_mpo.py tests/test_entanglement.py \
		tests/test_weighted.py tests/test_streamed.py tests/chains tests/contraction tests/joint $(ARGS)'

# Tracing every line makes tests nearly twice as slow, so .ci/run does without.
coverage:
	$(MAKE) test ARGS='-m "not jax" --cov $(ARGS)'

# ARGS=--quick or nothing; for other options, call the scripts (benchmarks/README.md).
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

# Runs in .venv where it exists, else in the Python that has the GPU's torch: nothing is installed.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

# Resumes where it stopped. ARGS=--quick: minutes; --text OLD NEW: other texts.
reproduce: env
	$(BIN)/python -m experiments $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. Pages run on all cores; a page runs again only if its code or the library changed.
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
