# make setup        .venv with the project and what it needs; then: source .venv/bin/activate
# make quickstart   set-up + the main job: corpus, tokenizer, training, report and a sample, on this machine
# make test         set-up with what tests need + the test suite (without the tests marked slow)
# make test-slow    the same set-up + the slow statistical tests
# make faults       the same set-up + every injected fault, with a table of what survived, and the training time kept under kills
# make lint         the same set-up + ruff (lint, format) and mypy
# make docs         the same set-up + the documentation as a site in site/, a broken link being an error
# make gpu-report   on a machine with a GPU: its tests and timings, with the installed Python, no network; REPORT="--seconds 330 ..."
# make clean        remove what builds, tests and checkers leave behind; .venv and runs stay

PYTHON ?= python3
VENV ?= .venv
# Test processes side by side, each with one thread; 0: all tests in one process.
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready_to_test
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.PHONY: help setup quickstart test test-slow faults lint docs gpu-report clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or later is needed, found " + sys.version.split()[0] + \
		". Name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the project and what it needs into $(VENV) (torch is most of it; some minutes on a slow line)"
	@$(INSTALL) '.[data]'
	@touch $@

$(READY_TO_TEST): $(READY)
	@echo "Installing what tests, checkers and the documentation need"
	@$(INSTALL) '.[dev]'
	@touch $@

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(READY_TO_TEST)
	$(PYTEST) -m "not slow"

test-slow: $(READY_TO_TEST)
	$(PYTEST) -m slow

faults: $(READY_TO_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -q -m "slow or not slow" --fault-table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.effective_time

lint: $(READY_TO_TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy megatron_completep

docs: $(READY_TO_TEST)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; to search in it: $(BIN)/python -m http.server --directory site"

gpu-report:
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) tools/gpu_report.py $(REPORT)

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
