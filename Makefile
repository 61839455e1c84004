# SPDX-License-Identifier: BSD-3-Clause
# make demo | test | bench | lint | mutate | setup | clean          PYTHON=python3.12 chooses the interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATOR := $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test bench lint mutate clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

demo: setup
	$(BIN)/pywino demo

# Two files at a time: most tests keep one core busy, a few all of them.
test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	$(BIN)/python -m pytest benches --benchmark-only

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

# Breaks the CUDA kernels token by token; each break must be noticed by the emulator's tests.
mutate: setup
	cd tests && ../$(BIN)/python -m emulator.mutate

# make gpu-check OUT=folder [DRY=1] [STAGES=a,b] [BUDGET=seconds]: everything that there is to prove
# and measure on a GPU, with the packages that its machine has (docs/gpu_check.md).
.PHONY: gpu-check
gpu-check:
	@test -n "$(OUT)" || { echo "type: make gpu-check OUT=folder"; exit 1; }
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benches/gpu/check.py --out "$(OUT)" \
	  $(if $(DRY),--dry-run) $(if $(STAGES),--stages $(STAGES)) $(if $(BUDGET),--budget $(BUDGET))

# make gpu-train OUT=folder [DRY=1] [RUNS=a,b] [BUDGET=seconds] [DATA=folder] [RESUME=folder] [MOST=MiB]:
# the training runs, on a GPU (docs/gpu_train.md).
.PHONY: gpu-train
gpu-train:
	@test -n "$(OUT)" || { echo "type: make gpu-train OUT=folder"; exit 1; }
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benches/gpu/train.py --out "$(OUT)" \
	  $(if $(DRY),--dry-run) $(if $(RUNS),--runs $(RUNS)) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(DATA),--data "$(DATA)") $(if $(RESUME),--resume "$(RESUME)") $(if $(MOST),--most $(MOST))

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache
	rm -f pywino/*.so pywino/_build.json

# Two stamps: the packages, and pywino itself, which is built again when native sources change.
$(VENV)/.requirements: requirements/constraints.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pywino needs Python 3.11 or later; type: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install -c requirements/constraints.txt -r requirements/dev.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements setup.py pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
