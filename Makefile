# make demo    set up and watch one model run on three workers
# make test    set up and run the tests
# make check   style, types, import directions
# make bench   measure (see benchmarks/README.md)
# make worlds  10,000 seeded worlds of the control plane in virtual time; make worlds SEED=17 tells the story of one
# make soak    kill, freeze and cut by the hundred, then churn; make soak SEEDS=137 MINUTES=0 replays one
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine without a GPU the CPU build of torch saves gigabytes:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
WORLDS ?= 10000
SEEDS ?= 0-499
MINUTES ?= 5

.PHONY: demo test check bench worlds soak setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON). Install Python 3.11 or newer, or say make PYTHON=/path/to/python"; exit 69; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or newer ($(PYTHON) is $$($(PYTHON) -V)). Say make PYTHON=/path/to/python3.11"; exit 69; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module. On Debian or Ubuntu: apt install python3-venv"; exit 69; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (torch is about 200 MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]' \
		|| { echo "missing: the packages above could not be installed. Is the package index reachable?"; exit 69; }
	@touch $@

demo: setup
	@$(BIN)/manyhands demo

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: setup
	$(BIN)/python -m benchmarks

worlds: setup
	$(BIN)/python tests/coordinator/run_worlds.py $(if $(SEED),--seed $(SEED),--seeds $(WORLDS))

soak: setup
	MANYHANDS_CHURN_SEEDS=$(SEEDS) $(BIN)/python -m pytest -v -k seed tests/e2e/test_e2e_churn.py
	$(BIN)/python -m benchmarks.churn --minutes $(MINUTES)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
