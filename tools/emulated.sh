#!/bin/sh
# The CUDA kernels without a GPU: the launches of tests/cpp/emulated under AddressSanitizer and UBSan and under
# ThreadSanitizer, and Python's tests with CPU tensors in a GPU's place (tests/emulated.py). The order of blocks and
# threads is random in all of them; tools/ctest.sh runs the launches in three orders.
#
# `emulated.sh short` is for every change; `emulated.sh` takes all tests that launch anything, and many rounds.
set -eu
python=${PYTHON:-python3}
if [ "${1:-long}" = short ]; then
  # each kernel and each way of launching it, from Python too, within minutes: fibers under ThreadSanitizer are slow
  rounds=100 races=4 tests="tests/test_ops.py tests/test_row_dots.py tests/test_step_control.py tests/test_step_plan.py
    tests/test_adaptive.py tests/test_plain_calls.py tests/test_shards.py tests/test_launches.py
    tests/test_fused_schedules.py"
else
  rounds=1000 races=30 tests=tests
fi
sh tools/ctest.sh build
launches=$(for source in tests/cpp/emulated/test_*launches.cpp; do basename "$source" .cpp; done)
export SIMT_ORDER=random
for sanitizer in address,undefined thread; do
  build=build/emulated-$(echo $sanitizer | cut -d, -f1)
  cmake -G Ninja -S . -B $build -DCMAKE_BUILD_TYPE=None -DFMKERNELS_PYTHON=OFF -DFMKERNELS_CUDA=emulated \
    -DFMKERNELS_SANITIZE=$sanitizer -DFMKERNELS_CPU_VARIANTS= >/dev/null
  # shellcheck disable=SC2086 # a list
  cmake --build $build --target $launches
done
# The sanitizers want addresses where they expect them.
fixed="setarch -R"
$fixed true 2>/dev/null || fixed=
for launch in $launches; do
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "build/emulated-address/$launch" $rounds &
  status=0
  TSAN_OPTIONS=halt_on_error=1 $fixed "build/emulated-thread/$launch" $races || status=$?
  wait $!
  [ $status = 0 ]
done
# shellcheck disable=SC2086 # a list
FMKERNELS_TEST_EMULATED=1 FMKERNELS_TEST_LIBRARY=$(echo build/ctest/_C*.so) \
  "$python" -m pytest -n auto --dist loadgroup -m "not host" $tests
