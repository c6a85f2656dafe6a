# make demo | make test | make lint | make test-lowest | make test-bits: each makes .venv if missing, installs pinned versions once, and runs.
SHELL := bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export HF_HUB_OFFLINE = 1
# Processes that run tests side by side, a thread each, so that they do not wait for each other's; a file is
# one process's, so that its fixtures are made once.
WORKERS ?= 2

# What must also work with the lowest versions that pyproject.toml allows: the packaged models, attaching, CLEAR,
# generating, published weights, training.
LOWEST := $(VENV)-lowest
LOWEST_TESTS := $(addprefix tests/test_,packaged.py attach.py clear.py generate_dit.py published.py \
	variants.py training_config.py training_runs.py doctor.py)

# Quantised bases and the optimizers of other packages, which every start of diffusers would import: apart.
BITS := build/bits
BITS_TESTS := $(addprefix tests/test_training_,quantization.py objectives.py)

.PHONY: demo test test-lowest test-bits lint
demo: $(VENV)/installed
	$(BIN)/interactdiff demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40

test-lowest: $(LOWEST)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(LOWEST_TESTS)

test-bits: $(VENV)/installed-dev $(BITS)/installed
	PYTHONPATH=$(BITS) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(BITS_TESTS)

# pyright sees the package as it installs: app/, pipelines/ and training/ are in it.
# Gradio's stubs of components are not ours.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/typecheck && mkdir -p build/typecheck
	cp -R interactdiff build/typecheck/
	cp -R app pipelines training build/typecheck/interactdiff/
	find build/typecheck -name '*.pyi' -delete
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/pip:
	@[ -n "$(PYTHON)" ] || { echo "expected Python 3.11 or newer on the PATH, found none" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Without build isolation, so that setuptools is a pinned one too.
$(VENV)/installed: constraints.txt pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV) (torch is large: the first time takes some minutes)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(LOWEST)/installed: constraints-lowest.txt pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-lowest.txt setuptools
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-lowest.txt \
		--no-build-isolation --editable ".[dev]"
	@touch $@

$(BITS)/installed: | $(BIN)/pip
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(BITS) \
		torchao==0.18.0 bitsandbytes==0.50.2 prodigyopt==1.1.2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
