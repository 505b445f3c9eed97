# make demo, make test: everything from a fresh clone. PYTHON picks the interpreter that makes .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0

# A development build is for this machine: CUDA kernels where it has a GPU. `make cuda` and `make wheel` build them for all
# architectures wherever nvcc is found.
GPU    := $(shell nvidia-smi -L 2>/dev/null)
export FMKERNELS_CUDA ?= $(if $(GPU),auto,off)

# Sources whose change calls for a new build of the compiled library.
SOURCES := $(shell find csrc python -type f) CMakeLists.txt setup.py pyproject.toml fmkernels/version.py

.PHONY: demo test test-emulated coverage-kernels sanitize bench mutants gpu lint format wheel docs clean setup cuda
.DEFAULT_GOAL := test

setup: $(VENV)/installed

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PIP="$(BIN)/python -m pip" TORCH=$(TORCH) sh tools/install_torch.sh
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24" "ninja>=1.11"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable ".[test,lint]"
	$(BIN)/python -m fmkernels env
	touch $@

demo: setup
	$(BIN)/python examples/digits.py --out demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python sh tools/ctest.sh

# The CUDA kernels on the CPU, under sanitizers and in Python. ARGS=short is for every change of a kernel.
test-emulated: setup
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python sh tools/emulated.sh $(ARGS)

# Which lines of the kernels and their bindings the launches above execute: fails below 95 %.
coverage-kernels: setup
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python sh tools/coverage.sh

# Plants the bugs of tools/mutants_*.py one at a time and tells which no test sees; not a part of CI.
mutants: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/mutants.py $(ARGS)

# The C++ code under AddressSanitizer and UBSan: all operations on random inputs. ARGS=short is what every change passes.
sanitize: setup
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python sh tools/sanitize.sh $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc python tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc python tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

docs: setup
	$(BIN)/python tools/api_reference.py docs/api.md

wheel: setup
	FMKERNELS_CUDA=auto PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The CUDA sources alone, for every architecture; says so and stops where there is no nvcc.
cuda: setup
	PATH="$(abspath $(BIN)):$$PATH" sh tools/cuda.sh

# On a machine with a GPU: its own python3, torch and Triton as they are, no isolation, no network.
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

clean:
	rm -rf build dist *.egg-info demo fmkernels/_C*.so
