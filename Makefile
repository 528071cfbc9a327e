# `make train` runs the main job, `make test` checks a change in minutes, `make test-all` checks everything. All of them
# install what is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

TOOLS  := $(VENV)/release-tools
PROJECT = -e ".[train,dev]"

.PHONY: train demo test test-all quick slowest test-versions setup lint format docs clean dist sbom test-release release-check
.DEFAULT_GOAL := train

train: setup  ## train a small language model on Python's own standard library (about two minutes on two cores)
	$(BIN)/bigbatch train $(ARGS)

demo: setup  ## draw the loss by the number of micro-batches: usual accumulation compared with bigbatch (a minute)
	$(BIN)/python examples/demo.py $(ARGS)

test: lint  ## lint, type-check and run every test but those marked slow: under 8 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: lint  ## lint, type-check and run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

quick: setup  ## lint, and run the tests of make test that the changes since main affect, the nearest first, for less than a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/quick_tests.py $(ARGS)

slowest: setup  ## run every test, list the twenty tests and files that use most CPU time, and tests that may need the marker slow
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --cpu-times 20 $(ARGS)

test-versions: setup  ## test with the lowest dependencies, and the integrations with the newest, each in its own environment
	$(BIN)/python .ci/framework_versions.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation site into site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: $(STAMP)

# $(1): an environment, $(2): what pip installs into it.
# A Debian python3 may come without ensurepip: then its own pip installs one, and without that, the package index.
define install
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) >/dev/null 2>&1 || $(PYTHON) -m venv --without-pip $(1)
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m pip --python $(1)/bin/python install --quiet -c constraints.txt pip 2>/dev/null || \
	  $(PYTHON) .ci/bootstrap_pip.py $(1)/bin/python
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(2)
	@touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	@echo "installing bigbatch and what it needs into $(VENV) (a few minutes)"
	$(call install,$(VENV),$(PROJECT))

dist: $(TOOLS)/installed  ## build the sdist and the wheel of the last commit into dist/, twice, and check both
	$(TOOLS)/bin/python .ci/distributions.py

sbom: dist  ## write the bill of materials of the wheel with its extra `train`, as CycloneDX JSON into dist/
	$(TOOLS)/bin/python .ci/bill_of_materials.py

test-release: dist  ## install the wheel into empty environments, with and without extras, and test it there
	$(TOOLS)/bin/python -m pytest -p no:cacheprovider --confcutdir=tests/release tests/release $(ARGS)

release-check:  ## refuse a release whose version, changelog, tag or working tree is not ready
	$(PYTHON) .ci/release_check.py

$(TOOLS)/installed: .ci/release-tools.txt constraints.txt
	@echo "installing the tools of a release into $(TOOLS) (under a minute)"
	$(call install,$(TOOLS),-r .ci/release-tools.txt)

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
