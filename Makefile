# make demo: the main job on this CPU.   make test: the whole default suite.   Both set up .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Nothing in the demo or in the tests may reach for a hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-slow check bench walk-table clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "opd needs Python 3.11 to 3.13; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## distil the embedded teacher into the embedded student; prints and saves a report
	$(BIN)/python -m opd

test: $(VENV)/.installed check  ## lint, types, import rules, then the default tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

check: $(VENV)/.installed  ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## the loss against naive full logits and TRL's chunked loss
	$(BIN)/python benchmarks/loss.py

walk-table: $(VENV)/.installed  ## the tables of docs/results.md: every method, three seeds; continues where it stopped
	$(BIN)/python benchmarks/walk_table.py

clean:  ## the environment and every output
	rm -rf $(VENV) outputs/artifacts
