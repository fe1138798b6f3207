# `make help` lists the targets. Everything is installed into .venv, made with $(PYTHON) (3.11 or newer).
PYTHON ?= python3
VENV := .venv
VERSIONS := -c constraints.txt
TESTS :=
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)

# Left to itself `accelerate launch` gives a CPU run one thread, and warns about each option it has to guess.
LAUNCH := $(BIN)/accelerate launch --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
	--num_cpu_threads_per_process=$(CORES)

# The tests run two processes of one thread each, need no network, and keep out of the user's Hugging Face cache.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=$(CURDIR)/$(VENV)/huggingface MPLBACKEND=agg

# The tests of the demo page need a browser.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: help quickstart demo test install-oldest test-oldest test-newest soak coverage mutants check format release-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

quickstart: $(VENV)/installed-train  ## install, train on the digits, load what was saved and sample: runs/digits/
	$(LAUNCH) examples/train.py
	$(BIN)/python examples/sample.py runs/digits

demo: $(VENV)/installed-demo runs/digits/model_index.json  ## open the demo page on the quickstart's model
	$(BIN)/python examples/app.py runs/digits

runs/digits/model_index.json:
	@echo "The demo shows the model of the quickstart, which is not there yet: it is trained first."
	$(MAKE) quickstart

test: $(VENV)/installed-dev  ## run the tests, or those of TESTS="tests/hub ..."
	$(if $(CHROMIUM),,@echo "No chromium or google-chrome on the PATH: the tests of the demo page are left out.")
	$(TEST_ENV) $(BIN)/python -m pytest $(TESTS) -n 2 --dist loadgroup $(if $(CHROMIUM),,-m "not browser")

install-oldest:
	$(MAKE) .venv-oldest/installed-dev VENV=.venv-oldest VERSIONS="-c constraints-oldest.txt"

test-oldest:  ## run the tests with the oldest versions allowed, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest VERSIONS="-c constraints-oldest.txt"

test-newest:  ## run the tests with the newest versions allowed, but the tested torch, in .venv-newest
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest VERSIONS="$(shell grep ^torch== constraints.txt)"

soak: $(VENV)/installed-dev  ## 500 pipeline calls and 2,000 training steps: whether memory, handles or threads grow
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(TEST_ENV) $(BIN)/python tests/soak.py

coverage: $(VENV)/installed-dev  ## run the tests and say what they never reach; fails below 97 %
	$(BIN)/coverage erase
	$(TEST_ENV) $(BIN)/coverage run -m pytest $(TESTS) -n 2 --dist loadgroup $(if $(CHROMIUM),,-m "not browser")
	$(BIN)/coverage combine
	$(BIN)/coverage report

mutants: $(VENV)/installed-dev  ## faults put into the flow, and whether tests see them (hours; MUTANTS="--only solver")
	$(TEST_ENV) PYTHONPATH=$(CURDIR) $(BIN)/python tests/mutants.py $(MUTANTS)

check: $(VENV)/installed-dev  ## format, lint, types and the order of the rooms, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev  ## format the code and apply the lint rules' own fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

release-check: $(VENV)/installed-dev  ## build into dist/, check it, install the wheel apart, run the README's code
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/release_check.py dist $(if $(wildcard runs/digits/model_index.json),--pipeline runs/digits)

clean:  ## remove the environments and the tools' caches; runs/ stays
	rm -rf .venv .venv-oldest .venv-newest .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage* build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-train: pyproject.toml $(wildcard constraints*.txt) | $(BIN)/python
	$(BIN)/python -m pip install $(VERSIONS) -e ".[train]"
	touch $@

$(VENV)/installed-demo: pyproject.toml $(wildcard constraints*.txt) | $(BIN)/python
	$(BIN)/python -m pip install $(VERSIONS) -e ".[demo]"
	touch $@

$(VENV)/installed-dev: pyproject.toml $(wildcard constraints*.txt) | $(BIN)/python
	$(BIN)/python -m pip install $(VERSIONS) -e ".[train,eval,demo,dev]"
	touch $@
