#!/bin/sh
# Builds the library with its CUDA launches emulated (tests/cpp/simt), and runs the C++ tests. `ctest.sh build` runs
# nothing: the Python module that is built beside them is what tools/emulated.sh runs Python's tests with.
set -eu
python=${PYTHON:-python3}
cmake -G Ninja -S . -B build/ctest -DFMKERNELS_CUDA=emulated -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
cmake --build build/ctest
[ "${1:-}" = build ] || ctest --test-dir build/ctest --output-on-failure
