# Each target makes .venv and installs what it needs, once; needed on the machine: python3 (3.10 or newer, with venv) and make.
# Without a GPU, `make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` saves downloading CUDA.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# the tests' tensors are so small that handing work to a second thread costs more than it saves
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# a process for each core, each with a part of the tests (pytest-xdist); eight at most, as each holds torch
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal
# models of real size are among these: no more than two at a time
SLOW := --numprocesses 2 --dist worksteal -m 'slow and not gpu'

PEER := .venv-peer

.PHONY: demo test test-slow check install bench docs mutants

demo: $(VENV)/.installed
	$(BIN)/gemma-grpo demo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed-peer
	$(TEST_ENV) $(BIN)/python -m pytest $(SLOW)

# plants one bug after another in a copy of the code; the test that is there for it must go red
mutants: $(VENV)/.installed-dev
	$(BIN)/python -m reliability.mutants

# our step beside TRL's, each in its own environment: bench/results, and the table and chart of docs/performance.md
bench: $(VENV)/.installed $(PEER)/.installed
	$(BIN)/python -m bench

# the pages of docs/ as a site in site/; stops at a warning, a dead link or a dead anchor
docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/write_reference.py
	$(BIN)/python -m mkdocs build --strict

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_architecture.py tests/test_imports.py

install: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gemma-grpo needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.installed-peer: $(VENV)/.installed-dev
	$(PIP) --editable '.[dev,peer,tasks]'
	touch $@

$(PEER)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt trl==1.16.0 peft safetensors
	touch $@
