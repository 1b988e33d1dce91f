# Every target sets up what it needs. `make help` lists them.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TF_ONLY := .venv-tf-only
NEWEST := .venv-newest
INTEGRATIONS := .venv-integrations
# Two processes of one thread each (tests/conftest.py). A file stays in one, because its tests share models; files go in
# their own order, since by number of tests, as pytest-xdist would have it, the longest would come last.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-tf-only test-integrations test-newest test-wheel bench lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

setup: $(VENV)/installed  ## make .venv from setup.cfg and constraints.txt

$(VENV)/installed: EXTRAS := dev
$(TF_ONLY)/installed: EXTRAS := tf-cpu,test
$(INTEGRATIONS)/installed: EXTRAS := integrations,test

$(VENV)/installed $(TF_ONLY)/installed $(INTEGRATIONS)/installed: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: setup  ## convert the shipped checkpoint; both frameworks answer questions about photographs
	$(BIN)/python examples/demo.py

test: setup  ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) --ignore tests/integrations

test-tf-only: $(TF_ONLY)/installed  ## run the tests of the core, Keras and the converter where torch is not installed
	$(TF_ONLY)/bin/python -c 'import sys; from importlib.util import find_spec as find; \
	    sys.exit("torch or tf_keras is installed" if find("torch") or find("tf_keras") else 0)'
	$(TF_ONLY)/bin/python -m pytest $(PARALLEL) tests/common tests/conversion tests/tf

test-integrations: $(INTEGRATIONS)/installed  ## run the tests with bitsandbytes, PEFT, TRL, ONNX and others, in an environment of their own
	$(INTEGRATIONS)/bin/python -m pytest $(PARALLEL) tests/integrations

# The core and PyTorch alone: what Keras takes of transformers is one class. torch is named with "==" as in constraints.txt.
test-newest:  ## run the tests of the core and PyTorch with the newest versions that setup.cfg admits
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager $$(grep ^torch== constraints.txt) \
	    --editable '.[train,test]'
	$(NEWEST)/bin/python -m pytest $(PARALLEL) tests/common tests/pt

test-wheel:  ## install the wheel without constraints.txt, in fresh environments, and run the README's quickstarts there
	$(PYTHON) tests/wheel.py

bench: setup  ## measure speed and memory against transformers on a quiet machine, about 40 minutes
	$(BIN)/python -m benchmarks

lint: setup  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets made
	rm -rf $(VENV) $(TF_ONLY) $(INTEGRATIONS) $(NEWEST) build demo-output *.egg-info .pytest_cache .ruff_cache .hypothesis
