#!/bin/sh
# Builds the library without Python, its CUDA launches emulated (tests/cpp/simt), and runs the C++ tests.
set -eu
cmake -G Ninja -S . -B build/ctest -DFMKERNELS_PYTHON=OFF -DFMKERNELS_CUDA=emulated -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build build/ctest
ctest --test-dir build/ctest --output-on-failure
