#!/bin/sh
# Compiles the CUDA sources for every architecture, where nvcc is found.
set -eu
if ! command -v nvcc >/dev/null 2>&1; then
  echo "make cuda: nvcc was not found, the CUDA sources are not compiled"
  exit 0
fi
cmake -G Ninja -S . -B build/cuda -DFMKERNELS_PYTHON=OFF -DFMKERNELS_TESTS=OFF -DFMKERNELS_CUDA=on -DCMAKE_BUILD_TYPE=Release
cmake --build build/cuda --target fm_core
