"""Bugs of the CUDA kernels for tools/mutants.py, seen by their emulator (tests/cpp/simt): its own test.

What they are like: a barrier or a check of bounds left out, a grid one block short, memory too small, alignment that is
not asked for. Some change no number in one order of threads, and are seen by another or by a sanitizer.
"""

from __future__ import annotations

LAUNCHES = "tests/cpp/emulated/test_launches.cpp"
ROW_DOTS = "tests/cpp/emulated/test_row_dots_launches.cpp"
STEPS = "tests/cpp/emulated/test_step_launches.cpp"

REDUCE = "csrc/common/reduce.cuh"
RANGE = "csrc/common/range.cuh"
STEP_ROWS = "csrc/step_control/step_rows_body.cuh"
ROW_DOTS_CUDA = "csrc/row_dots/row_dots_cuda.cu"

MUTANTS: list[tuple[str, str, str, str | tuple[str, ...]]] = [
    # ------------------------------------------------------------------ barriers and shuffles
    (
        REDUCE,
        "warps[threadIdx.x / 32] = static_cast<double>(value);\n  __syncthreads();",
        "warps[threadIdx.x / 32] = static_cast<double>(value);",
        LAUNCHES,
    ),
    (REDUCE, "  __syncthreads();  // the table of values is complete\n", "", LAUNCHES),
    (ROW_DOTS_CUDA, "  }\n  __syncthreads();\n", "  }\n", ROW_DOTS),
    (
        "csrc/step_control/step_control_cuda.cu",
        "      __syncthreads();\n      if (threadIdx.x <",
        "      if (threadIdx.x <",
        STEPS,
    ),
    (
        ROW_DOTS_CUDA,
        "  const RowDotsBody<Shape> body = row_dots_lane<Shape>(p, row, lane);",
        "  if (row >= p.rows) return;\n  const RowDotsBody<Shape> body = row_dots_lane<Shape>(p, row, lane);",
        ROW_DOTS,
    ),
    # ------------------------------------------------------------------ memory
    (REDUCE, "FM_SHARED(warps, double[32]);", "FM_SHARED(warps, double[4]);", LAUNCHES),
    (
        REDUCE,
        "for (int64_t j = threadIdx.x; j < parts; j += blockDim.x) sum += partial[j];",
        "for (int64_t j = threadIdx.x; j <= parts; j += blockDim.x) sum += partial[j];",
        LAUNCHES,
    ),
    (
        ROW_DOTS_CUDA,
        "p.workspace[pair * p.partition.blocks + blockIdx.x]",
        "p.workspace[pair * p.partition.parts + blockIdx.x]",
        ROW_DOTS,
    ),
    ("csrc/common/linear.cuh", "% 16 == 0; }", "% 1 == 0; }", LAUNCHES),
    # ------------------------------------------------------------------ grids and parts
    (
        "csrc/random/random_cuda.cu",
        "(a.count + Shape::tile - 1) / Shape::tile",
        "a.count / Shape::tile + (a.count < Shape::tile)",
        LAUNCHES,
    ),
    (RANGE, "const bool wide = vectors && begin % V == 0;", "const bool wide = vectors;", LAUNCHES),
    (RANGE, "if (p.group_elements <= small_group) {", "if (groups > 1 && p.group_elements <= small_group) {", LAUNCHES),
    (RANGE, "if (end > first + group_elements) end = first + group_elements;", "", LAUNCHES),
    ("csrc/row_dots/row_dots_body.cuh", "p.runs = a.inner % Shape::V == 0;", "p.runs = p.vectors;", ROW_DOTS),
    (
        "csrc/step_control/step_rows_body.cuh",
        "return time(j) == a.clock[at_t * a.rows + row];",
        "return false;",
        STEPS,
    ),
    (STEP_ROWS, "if (p.by_inner.divide(end) == row) {", "if (end <= last) {", STEPS),
    (STEP_ROWS, "e <= end && e <= last; ++e)", "e <= end; ++e)", STEPS),
    (
        "csrc/step_control/step_control_cuda.cu",
        "    __syncthreads();  // what one thread moves another one may have read\n",
        "",
        STEPS,
    ),
]
