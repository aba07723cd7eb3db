# `make quickstart` runs the main job, `make test` runs lint, types and tests.
# Each makes .venv with pinned, tested versions first, if that has not happened yet.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: quickstart test clean

quickstart: $(READY)
	$(VENV)/bin/chinese-llama quickstart

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing pinned versions into $(VENV): a minute or more ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) quickstart quickstart.run chinese-llama.yaml build dist
