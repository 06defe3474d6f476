# The commands of this project. `make demo` and `make test` set up what they need in .venv first.
# With PYTHON=/path/to/python they run in that environment instead, install nothing, and say what it lacks;
# `make install PYTHON=...` installs into it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env install demo test lint audit bench docs compat gpu release clean
.DELETE_ON_ERROR:

VENV := .venv
JOBS ?= 2
ARGS ?=
PIP_INSTALL := -m pip install --disable-pip-version-check -c constraints.txt
# Compared with in tests and benchmarks. Their own requirements are stale (one pins torch 2.0.1), hence --no-deps.
PEERS := open-flamingo flamingo-pytorch einops-exts liger-kernel
LIBRARY := torch transformers rich safetensors numpy PIL yaml

ifdef PYTHON
PY := $(PYTHON)
READY :=
# $(call require,modules): stop with one line when the given environment lacks some of the modules.
require = @$(PY) -c 'import sys; from importlib.util import find_spec; \
	lacks = [name for name in sys.argv[1:] if find_spec(name) is None]; \
	sys.exit(f"{sys.executable} lacks: {chr(32).join(lacks)}. To install into it: make install PYTHON={sys.executable}" \
	if lacks else 0)' $(LIBRARY) $(1)
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
require =
endif

define install
	$(1) $(PIP_INSTALL) setuptools wheel
	$(1) $(PIP_INSTALL) --no-build-isolation -e '.[demo,test,bench,lint]'
	$(1) $(PIP_INSTALL) --no-deps $(PEERS)
endef

help: ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

env: $(READY) ## create .venv and install the tested versions into it
	$(call require)

install: $(READY) ## the same installation into the environment of PYTHON
ifdef PYTHON
	$(call install,$(PY))
endif

# The stamp stands for a finished installation, so that a second command installs nothing.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@python=; for candidate in python3 python3.11 python3.12; do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
		then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then echo "Python 3.11 or 3.12 is needed, and none of python3, python3.11, python3.12 is one" >&2; exit 1; fi; \
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $$python -m venv --clear $(VENV); }
	$(call install,$(VENV)/bin/python)
	@touch $@

demo: $(READY) ## run the main job on real images
	$(call require,matplotlib skimage sklearn)
	$(PY) -m mllm_fast.cli demo $(ARGS)

# One thread a worker: the shapes are small, and two workers with one thread each beat one with two.
test: $(READY) ## run the tests; ARGS="-k name" selects
	$(call require,pytest xdist)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(READY) ## check style and types
	$(call require,ruff mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY) ## measure every block against its peers; ARGS="--list" and others go to python -m bench
	$(call require,matplotlib)
	$(PY) -m bench $(ARGS)

audit: $(READY) ## compile every kernel without a GPU; ARGS="--arch sm_90" selects
	$(call require)
	$(PY) -m mllm_fast.cli audit --processes $(JOBS) $(ARGS)

docs: $(READY) ## write docs/api.md anew, from the docstrings
	$(call require)
	$(PY) docs/generate_api.py

# Each environment is made once, in .compat/. The oldest versions of torch download gigabytes where pip finds no builds for CPUs.
compat: $(READY) ## test at the ends of the supported versions; ARGS="--list" lists them, names select
	$(call require,pytest)
	$(PY) -m tests.compat.environments $(ARGS)

# Under nine minutes, for each step has its share of them. Every step runs, also after one that failed; the exit status
# tells whether all went well. The results go to bench/results/<name of the GPU>/, the benchmarks' after every workload.
# The tests spend their time compiling, hence the processes.
# The last step lets the library choose by them; it needs no GPU, so that it can also be run where the results are kept.
gpu: $(READY) ## run everything that needs a GPU
	$(call require,pytest xdist matplotlib)
	@failed=; \
	step() { echo "== $${*:2}"; timeout --signal=INT --kill-after=5 "$$@" || failed="$$failed [$${*:2}]"; }; \
	gpu=$$($(PY) -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())' 2>/dev/null) || \
		{ echo "no GPU was found; make audit and make bench need none" >&2; exit 2; }; \
	results=bench/results/$$gpu; mkdir -p $$results; \
	step 15 $(PY) -m mllm_fast.cli info; \
	step 150 $(PY) -m pytest -m gpu -n $$(( $$(nproc) < 12 ? $$(nproc) : 12 )) --dist worksteal $(ARGS); \
	step 110 $(PY) -m mllm_fast.cli audit --arch native --processes $$(nproc); \
	step 200 $(PY) -m bench --out $$results/bench.json; \
	step 15 $(PY) -m bench --plot $$results/bench.json; \
	step 10 $(PY) -m bench --record $$results/bench.json; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

# The version's changelog, the build from a clean tree, and the upload are people's: CONTRIBUTING.md.
release: $(READY) ## build the sdist and the wheel into dist/, and try each in a fresh environment
	$(call require,build twine)
ifndef PYTHON
	$(PY) $(PIP_INSTALL) --quiet build twine
endif
	rm -rf build dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*
	$(PY) tests/fresh_environment.py dist/*

clean: ## remove builds and caches, but not .venv
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kernels mllm_fast tests bench -name __pycache__ -prune -exec rm -rf {} +
