# Two commands: `make train` runs the main job, `make test` checks everything. Both install what is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: train demo test test-versions setup lint format docs clean
.DEFAULT_GOAL := train

train: setup  ## train a small language model on Python's own standard library (about two minutes on two cores)
	$(BIN)/bigbatch train $(ARGS)

demo: setup  ## draw the loss by the number of micro-batches: usual accumulation compared with bigbatch (a minute)
	$(BIN)/python examples/demo.py $(ARGS)

test: lint  ## lint, type-check and run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-versions: setup  ## test the integrations with the lowest and the newest frameworks, each in its own environment
	$(BIN)/python .ci/framework_versions.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# A Debian python3 may come without ensurepip: then its own pip installs into the bare environment.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --without-pip $(VENV)
	@echo "installing bigbatch and what it needs into $(VENV) (one to two minutes)"
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev]"; \
	else \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev]"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
