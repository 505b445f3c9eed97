#!/bin/sh
# Which lines of the CUDA kernels and of what launches them are executed without a GPU: by the launches of
# tests/cpp/emulated and by Python's tests with CPU tensors in a GPU's place (tests/emulated.py). Of csrc/ those count
# that the kernels' files are made of, as their device branches are compiled, and of python/ the bindings.
#
# `coverage.sh` fails below 95 %, and leaves build/coverage/lines.txt, which names the lines that nothing executes.
set -eu
python=${PYTHON:-python3}
build=build/coverage
least=95
tests="tests/test_ops.py tests/test_op_modes.py tests/test_row_dots.py tests/test_step_control.py tests/test_adaptive.py
  tests/test_adaptive_batches.py tests/test_strides.py tests/test_noise.py tests/test_step_plan.py tests/test_odeint.py"
cmake -G Ninja -S . -B $build -DCMAKE_BUILD_TYPE=None -DFMKERNELS_CUDA=emulated -DFMKERNELS_COVERAGE=ON \
  -DFMKERNELS_CPU_VARIANTS= -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$($python -m pybind11 --cmakedir)" >/dev/null
cmake --build $build
find $build -name '*.gcda' -delete
for source in tests/cpp/emulated/test_*launches.cpp; do
  SIMT_ORDER=random "$build/$(basename "$source" .cpp)" 120
done
# one process, which writes its counts as it ends
# shellcheck disable=SC2086 # a list
FMKERNELS_TEST_EMULATED=1 FMKERNELS_TEST_LIBRARY=$(echo $build/_C*.so) \
  "$python" -m pytest -q -n 0 -m "not host" $tests
"$python" -m gcovr --root . --exclude-throw-branches --merge-lines --merge-mode-functions=separate \
  --filter 'csrc/' --filter 'python/' --txt $build/lines.txt --print-summary --fail-under-line $least \
  $build/CMakeFiles/fm_cuda.dir $build/CMakeFiles/_C.dir
cat $build/lines.txt
