# The knobs: which Python to build .venv from (3.11 or newer), and which torch to install where that Python has none (once .venv is made
# its own are the defaults); and how many processes share the tests, each of which may start eight of its own.
-include .venv/knobs.mk
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

bin := .venv/bin

.PHONY: help demo setup test test-all lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      set up and train a small Llama on the embedded corpus: minutes on two CPU cores"
	@echo "make setup     make .venv with this checkout and what it depends on"
	@echo "make test      set up, lint, and run the tests that cover every claim"
	@echo "make test-all  the same with the full matrices; the result is written to tests/results/"
	@echo "make lint      ruff, import-linter and pyright"
	@echo "make clean     remove .venv and caches (runs are kept)"
	@echo "knobs: PYTHON=$(PYTHON) TORCH=$(TORCH) WORKERS=$(WORKERS)"

demo: .venv/ready
	$(bin)/paraxis train demo

setup: .venv/ready

test: lint
	$(bin)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not full and not gpu"

test-all: lint
	$(bin)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not gpu" --record tests/results
	$(bin)/python -m pytest -q -m gpu

lint: .venv/ready-to-test
	$(bin)/ruff check .
	$(bin)/lint-imports
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(bin)/pyright --pythonpath $(bin)/python

# A knob that is given is compared with what .venv was made with: met or refused, never ignored.
ifneq ($(filter command environment,$(origin PYTHON) $(origin TORCH)),)
.PHONY: .venv/ready
endif

.venv/ready: pyproject.toml
	$(PYTHON) tools/make_venv.py "$(TORCH)"
	@touch $@

.venv/ready-to-test: .venv/ready
	$(bin)/python -m pip install --quiet --constraint .venv/constraints.txt --no-build-isolation --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache build paraxis.egg-info
	find paraxis tests tools -name __pycache__ -prune -exec rm -rf {} +
