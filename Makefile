# The whole project from one place; `make help` lists the targets.
PYTHON ?= python3.11
CONFIG = quickstart.yaml
ARGS =
SOURCE = hub

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(BIN)/uv
UV_VERSION := 0.13.9
MODEL := models/SmolLM2-135M-Instruct
DATA = $(if $(findstring gsm8k,$(CONFIG)),gsm8k,arithmetic)
CONFIG_FILE = $(if $(findstring /,$(CONFIG)),$(CONFIG),configs/$(CONFIG))

# torch without CUDA comes from the folder pip is pointed at, if any, and else from PyTorch's own CPU index.
empty :=
space := $(empty) $(empty)
comma := ,
ifdef PIP_FIND_LINKS
UV_SOURCE := UV_FIND_LINKS="$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))"
else
UV_SOURCE := UV_TORCH_BACKEND=cpu
endif

.DEFAULT_GOAL := help
.PHONY: help setup model data train train-7b test unit integration lint lock clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo '  CONFIG=gsm8k.yaml        a file of configs/, or a path'
	@echo '  ARGS="key=value ..."     overrides of configuration keys (rlhf3d config lists them)'
	@echo '  SOURCE=folder            where the data set of CONFIG lies, if it is not generated'

setup: $(READY) ## make the environment .venv from requirements/cpu.lock

$(READY): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it, or say PYTHON=/its/path" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "Python 3.11 is needed; $(PYTHON) is $$($(PYTHON) --version): say PYTHON=/path/of/python3.11" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
		echo "a C++ compiler is needed: install g++ (Debian: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(UV_SOURCE) $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -r requirements/cpu.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

model: $(MODEL)/config.json ## write SmolLM2-135M-Instruct as a Hugging Face folder

$(MODEL)/config.json: | $(READY)
	$(BIN)/python tools/make_smollm2.py --output $(MODEL)

data: data/$(DATA)/test.parquet ## prepare the data set of CONFIG

data/arithmetic/test.parquet: | $(READY)
	$(BIN)/rlhf3d data prepare arithmetic --output data/arithmetic

data/gsm8k/test.parquet: | $(READY)
	$(BIN)/rlhf3d data prepare gsm8k --source $(SOURCE) --output data/gsm8k

# The shipped small jobs get their model and data; for another CONFIG they are the user's.
train: setup $(if $(filter quickstart% gsm8k%,$(notdir $(CONFIG))),model data) ## train CONFIG (quickstart.yaml)
	$(BIN)/rlhf3d train $(CONFIG_FILE) $(ARGS)

train-7b: CONFIG = math.yaml
train-7b: setup ## the 8-GPU job (math.yaml); REHEARSE=1 runs it in miniature on this machine's CPU
	$(BIN)/rlhf3d $(if $(REHEARSE),rehearse,train) $(CONFIG_FILE) $(ARGS)

test: lint unit integration ## all checks

unit: setup ## tests that take seconds
	$(BIN)/python -m pytest -q tests/unit

integration: setup model $(VENV)/te ## tests on real Megatron, vLLM and Ray
	$(BIN)/python -m pytest -q tests/integration

# Transformer Engine's sources, apart from the environment: Megatron takes it wherever it can import it.
$(VENV)/te: requirements/gpu.txt | $(READY)
	rm -rf $@
	$(UV_SOURCE) $(UV) pip install --quiet --python $(BIN)/python --no-deps --target $@ '$(shell grep ^transformer-engine requirements/gpu.txt)'
	@touch $@

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup ## resolve requirements/cpu.txt anew into requirements/cpu.lock
	$(UV_SOURCE) $(UV) pip compile requirements/cpu.txt --override requirements/overrides.txt \
		--python-version 3.11 --no-annotate --no-header --upgrade --output-file requirements/cpu.lock

clean: ## remove caches and build leftovers; models, data, runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
