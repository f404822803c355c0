# SPDX-License-Identifier: Apache-2.0
# Each target does all it needs, from a fresh clone on. `make` alone lists them.
# The environments are made once and marked with a stamp, so that the next make starts at once.

PYTHON ?= python3
VENV := .venv
PIP_INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check --no-input -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs oracle plan newest bench lint

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

# --- environments -----------------------------------------------------------------------------

# Ends make with one line when the interpreter cannot make an environment; otherwise expands to nothing.
# `|| true`: make prints what $(shell) read to stderr when the command was not found.
PYTHON_HINT = install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python), or name one: make PYTHON=/path/to/python3.11
define require_python
$(if $(shell $(PYTHON) -c 'import sys; print("ok" if sys.version_info >= (3, 11) else "")' 2>/dev/null || true),,$(error PYTHON=$(PYTHON) answers "$(shell ( $(PYTHON) -V ) 2>&1 || true)": $(PYTHON_HINT)))$(if $(shell $(PYTHON) -c 'import venv, ensurepip; print("ok")' 2>/dev/null),,$(error PYTHON=$(PYTHON) has no venv module: $(PYTHON_HINT)))
endef

# An environment that was cut off before it had pip is made again; a whole one is left alone.
define make_venv
$(if $(wildcard $(1)/bin/python),,$(require_python))$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1)
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(call make_venv,$(VENV))
	@echo "Installing maxkit and $$(grep -c == constraints.txt) pinned packages into $(VENV): some minutes, once"
	@$(VENV)/bin/python $(PIP_INSTALL) -e ".[notebooks,post-train,docs,dev]"
	@touch $@

# The same JAX stack as in .venv; PyTorch fixed, everything else as new as it gets: that is what oracles are for.
.venv-oracle/.stamp: pyproject.toml constraints.txt
	@$(call make_venv,.venv-oracle)
	@echo "Installing PyTorch, the newest transformers, peft and lm-eval into .venv-oracle: some minutes, once"
	@grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain)==' constraints.txt > .venv-oracle/constraints.txt
	@.venv-oracle/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-input \
		-c .venv-oracle/constraints.txt torch==2.13.0 transformers peft lm-eval pytest pytest-cov pytest-xdist -e .
	@touch $@

# llama.cpp's converter of Hugging Face folders comes with the sources of its Python bindings; nothing is built.
LLAMA_CPP_PYTHON = 0.3.36
.venv-oracle/llama.cpp/.stamp-$(LLAMA_CPP_PYTHON): .venv-oracle/.stamp
	@echo "Fetching llama.cpp's converter into .venv-oracle: 77 MB, once"
	@.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check --no-input sentencepiece
	@mkdir -p .venv-oracle/llama.cpp
	@cd .venv-oracle/llama.cpp && ../bin/python -m pip download --quiet --disable-pip-version-check --no-input --no-deps \
		--no-binary llama-cpp-python llama-cpp-python==$(LLAMA_CPP_PYTHON)
	@cd .venv-oracle/llama.cpp && tar xzf llama_cpp_python-*.tar.gz --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/gguf/*'
	@rm .venv-oracle/llama.cpp/*.tar.gz
	@touch $@

.venv-tpu/.stamp: pyproject.toml constraints.txt
	@$(call make_venv,.venv-tpu)
	@echo "Installing the TPU compiler into .venv-tpu: some minutes, once"
	@.venv-tpu/bin/python $(PIP_INSTALL) -e ".[tpu]"
	@touch $@

# The newest JAX needs a newer Python than the pins do.
PYTHON_NEWEST ?= python3.13
.venv-newest/.stamp: pyproject.toml
	@[ -x .venv-newest/bin/python ] || $(PYTHON_NEWEST) -m venv .venv-newest
	@echo "Installing the newest versions of everything into .venv-newest: some minutes, once"
	@.venv-newest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-input \
		-e ".[notebooks]" pytest pytest-cov pytest-xdist hypothesis gguf
	@touch $@

# --- what people call -------------------------------------------------------------------------

setup: $(VENV)/.stamp  ## make .venv and install everything but the TPU compiler and the oracles
	@echo "Ready. Enter the environment with: . $(VENV)/bin/activate"

demo: $(VENV)/.stamp  ## fine-tune SmolLM2-135M-Instruct on real chat data, on this machine
	@mkdir -p runs/demo
	@$(VENV)/bin/maxkit run sft -p run_dir=runs/demo -o runs/demo/sft.ipynb

test: $(VENV)/.stamp  ## run all tests but the slow ones, tier by tier
	@$(VENV)/bin/python tests/run_tiers.py

docs: $(VENV)/.stamp  ## build the documentation into docs/_build/html
	@$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

oracle: .venv-oracle/.stamp .venv-oracle/llama.cpp/.stamp-$(LLAMA_CPP_PYTHON)  ## compare live with PyTorch, transformers and lm-eval
	@.venv-oracle/bin/python tests/run_tiers.py oracle

TOPOLOGY ?= v5e:2x2
plan: .venv-tpu/.stamp  ## compile the SFT step for a TPU topology: TOPOLOGY=v5e:2x2
	@JAX_PLATFORMS=cpu .venv-tpu/bin/maxkit plan sft --topology $(TOPOLOGY)

SMOKE := tests/unit/test_decoder.py tests/unit/test_sharding.py tests/unit/test_optim.py tests/unit/test_store.py \
	tests/unit/test_loader.py tests/unit/test_engine.py tests/unit/test_cross_entropy.py \
	tests/notebooks/test_recipes.py::test_pretrain_resumes
newest: .venv-newest/.stamp  ## the smoke tests on the newest versions of everything: PYTHON_NEWEST=python3.13
	@.venv-newest/bin/python -m pytest -q -n 2 $(SMOKE)

BENCHMARKS ?= benchmarks/train_step.py benchmarks/decode.py
bench: $(VENV)/.stamp  ## measure a training step and decoding, one JSON line each
	@for script in $(BENCHMARKS); do $(VENV)/bin/python $$script || exit 1; done

lint: $(VENV)/.stamp  ## style, types, import directions and the guards of the notebooks
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/maxkit check
