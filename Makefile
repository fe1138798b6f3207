# `make help` lists the targets. Everything is installed into .venv, made with $(PYTHON) (3.11 or newer).
PYTHON ?= python3
VENV := .venv
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

.PHONY: help quickstart demo test check format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

quickstart: $(VENV)/installed-train  ## install, train on the digits, load what was saved and sample: runs/digits/
	$(LAUNCH) examples/train.py
	$(BIN)/python examples/sample.py runs/digits

demo: $(VENV)/installed-demo runs/digits/model_index.json  ## open the demo page on the quickstart's model
	$(BIN)/python examples/app.py runs/digits

runs/digits/model_index.json:
	@echo "The demo shows the model of the quickstart, which is not there yet: it is trained first."
	$(MAKE) quickstart

test: $(VENV)/installed-dev  ## run the tests
	$(if $(CHROMIUM),,@echo "No chromium or google-chrome on the PATH: the tests of the demo page are left out.")
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup $(if $(CHROMIUM),,-m "not browser")

check: $(VENV)/installed-dev  ## format, lint and types, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format the code and apply the lint rules' own fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the tools' caches; runs/ stays
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,eval,demo,dev]"
	touch $@
