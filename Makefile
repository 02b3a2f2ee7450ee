# PYTHON makes the virtual environment; VENV is where it lives; TORCH is the build of torch to install into it;
# MODEL is the quickstart's: dense or moe.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= dense
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP = $(VENV)/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: venv quickstart test soak lint clean

venv: $(STAMP)

# torch goes first and alone: the build that this machine offers is settled before anything that depends on it
$(STAMP): requirements.txt setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

quickstart: venv
	MODEL="$(MODEL)" PYTHON="$(abspath $(VENV))/bin/python" bash examples/quickstart/run.sh

# tests of the CPU's emulated devices cannot share a process, or a machine's view, with real ones
test: venv
	$(VENV)/bin/python -m pytest -m gpu tests/gpu
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -m "not gpu and not soak"

soak: venv
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -m soak

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
