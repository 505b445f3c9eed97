#!/bin/sh
# The library under AddressSanitizer and UBSan, where an access outside any tensor's memory and whatever is undefined ends
# the run: all operations on random shapes, strides, dtypes and offsets (tests/fuzz), and the tests next to the library.
#
# `sanitize.sh short` is for every change: one instruction set, a few rounds, under two minutes. `sanitize.sh` takes all
# instruction sets that the machine has, many rounds, and the C++ tests.
set -eu
compiler=${CXX:-c++}
python=${PYTHON:-python3}
build=build/sanitize
if [ "${1:-long}" = short ]; then
  variants=avx2 cpp=OFF rounds=25 instruction_sets=avx2
  tests="tests/fuzz tests/test_plain_calls.py tests/test_step_plan.py"
else
  variants="avx2;avx512" cpp=ON rounds=400 instruction_sets="baseline avx2 avx512"
  tests="tests/fuzz tests/test_plain_calls.py tests/test_step_plan.py
    tests/test_row_dots.py tests/test_step_control.py tests/test_adaptive.py tests/test_adaptive_batches.py"
fi
cmake -G Ninja -S . -B $build -DCMAKE_BUILD_TYPE=None -DFMKERNELS_SANITIZE=address,undefined -DFMKERNELS_CUDA=off \
  -DFMKERNELS_CPU_VARIANTS="$variants" -DFMKERNELS_TESTS=$cpp -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$($python -m pybind11 --cmakedir)" >/dev/null
cmake --build $build
if [ $cpp = ON ]; then ctest --test-dir $build --output-on-failure; fi
# libstdc++ too: the sanitizer must find it when it begins, or it cannot follow exceptions
preload=
for name in libasan.so libclang_rt.asan.so libstdc++.so; do
  file=$($compiler -print-file-name=$name)
  if [ -e "$file" ]; then preload="$preload $file"; fi
done
for isa in $instruction_sets; do
  # the sanitizer reports by the file descriptor that pytest would capture
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FMKERNELS_ISA=$isa \
    FMKERNELS_TEST_LIBRARY=$(echo $build/_C*.so) FMKERNELS_FUZZ_ROUNDS=$rounds \
    "$python" -m pytest -q --capture=sys $tests
done
