# Everything a newcomer needs, from a bare clone: each target first makes the environment in .venv and builds csrc/,
# and does again only what a change asks for.
#   PYTHON   the interpreter to build .venv with (3.10 or newer)        make demo PYTHON=python3.12
#   ARGS     passed on to the command behind a target                   make test ARGS="-k rms_norm -x"
PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
# Twice quiet: pip prints errors only, not a warning per package index that lacks a package.
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet

.PHONY: help install demo test lint static bench gpu sweep docs clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

install: .venv/.installed fastllm/_C.abi3.so ## the environment in .venv and the C++ kernels, nothing more

demo: install ## the main job: train a small Llama on real text, unpatched and patched, and print the comparison
	@$(PY) -m bench.demo $(ARGS)

# A worker per core, and threads that sleep while they wait: spinning ones would take the cores from the other workers.
test: install ## every test
	@OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

lint: install ## ruff and mypy
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

static: install ## compile every GPU kernel for every chip and say what is wrong with it; needs no GPU
	@$(PY) -m bench static $(ARGS)

bench: install ## each op beside its peers, with the bandwidth limit of this machine
	@$(PY) -m bench $(or $(ARGS),kernels)

gpu: ## on a machine with a GPU, its own torch and nvcc: build, test, time, by `python3` or PYTHON=..., within 9 minutes
	@$(or $(PYTHON),python3) -m bench gpu $(ARGS)

sweep: install ## patch every causal-LM family of the installed transformers and compare it with the unpatched model
	@$(PY) -m fastllm.patching.sweep --markdown docs/families.md --least 130 $(ARGS)

docs: install ## write docs/ops from the docstrings and docs/benchmarks.md from bench/results
	@$(PY) docs/generate.py
	@$(PY) -m bench report

clean: ## remove the environment and everything built
	rm -rf .venv build dist *.egg-info fastllm/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch and setuptools come first because the extension is compiled against the very torch it will be loaded into
# (--no-build-isolation; an isolated build would download a second one). On Linux without an NVIDIA driver the index of
# CPU wheels saves several GB of CUDA libraries; whoever has told pip where to look is left alone.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastllm needs Python 3.10 or newer; say which with PYTHON=python3.11"; exit 1; }
	@test -x $(PY) || { echo "Making the environment in .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch and the other dependencies (a few minutes the first time)"
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(PY) -m pip config list | grep -E 'index-url|find-links' >/dev/null; then \
	  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi; \
	$(PIP) install -c constraints.txt torch "setuptools>=77" wheel && \
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# Only what changed is compiled (setup.py compares times). Without a compiler this says so and goes on: everything but
# the C++ backend works, and this rule tries again the next time.
fastllm/_C.abi3.so: .venv/.installed setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@echo "Building the C++ kernels"
	@$(PY) setup.py --quiet build_ext --inplace
