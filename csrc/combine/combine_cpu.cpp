#include <cmath>

#include "../common/cpu_tile.h"
#include "../common/isa.h"
#include "combine.h"
#include "error_ratio.h"

namespace fm {
namespace FM_ISA {
namespace {

// True where an in-place call multiplies a whole stretch by exactly 1, and so has nothing to do.
template <typename T>
bool leaves_unchanged(const CombineArguments& a, int64_t i, int64_t n) {
  if (a.count != 1 || a.out != a.operands[0].data || a.norm != nullptr) return false;
  const int64_t first = i / a.inner, last = (i + n - 1) / a.inner;
  for (int64_t row = first; row <= last; ++row)
    if (coefficient_at<T>(a.operands[0].coefficient, row) != T(1)) return false;
  return true;
}

// The norm's sum over a tile.
template <typename T>
double norm_tile(const CombineArguments& a, int64_t i, int64_t n, const T* y) {
  alignas(64) T first_buffer[noise_buffer], error_buffer[noise_buffer];
  const T* first = load_operand(a.operands[0], a.dtype, a.rows * a.inner, i, n, first_buffer);
  const T* e = y;
  if (a.has_error) {
    linear_tile(a.operands, a.count, &Operand::error, a.dtype, a.rows * a.inner, a.inner, i, n, error_buffer);
    e = error_buffer;
  }
  const T atol = static_cast<T>(a.atol), rtol = static_cast<T>(a.rtol);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += error_square(e[j], first[j], y[j], atol, rtol);
  return sum;
}

template <typename T>
Status combine_as(const CombineArguments& a) {
  const int64_t elements = a.rows * a.inner;
  const Output out(a.out, a.dtype, elements);
  // Tiles do not cross samples where there is a norm, so that its partial sums are fixed by the shape alone.
  const int64_t groups = a.norm != nullptr ? a.samples : 1;
  const int64_t group_elements = elements / groups;
  const int64_t group_tiles = (group_elements + tile_elements - 1) / tile_elements;
  const Partials partials(a.norm != nullptr ? groups * group_tiles : 0);
  double* partial = partials.data;
  const bool fused = a.norm == nullptr && a.count <= Linear<T>::limit && a.inner >= segment_elements;
#pragma omp parallel for schedule(static) if (elements > parallel_elements)
  for (int64_t t = 0; t < groups * group_tiles; ++t) {
    const int64_t begin = t % group_tiles * tile_elements;
    const int64_t i = t / group_tiles * group_elements + begin;
    const int64_t n = minimum(tile_elements, group_elements - begin);
    if (leaves_unchanged<T>(a, i, n)) continue;
    if (fused) {
      Linear<T> linear;
      linear.load(a.operands, a.count, a.dtype, elements, i, n);
      for_each_row(a.inner, i, n, [&](int64_t row, int64_t j, int64_t m) {
        linear.select_row(&Operand::coefficient, row);
        out.template produce<T>(i + j, m, [&](int64_t first, int64_t length, T* y) {
          linear.template evaluate<false>(j + first, length, y);
        });
      });
    } else {
      alignas(64) T y[tile_elements];
      linear_tile(a.operands, a.count, &Operand::coefficient, a.dtype, elements, a.inner, i, n, y);
      // before the output replaces the first operand, which the norm reads
      if (a.norm != nullptr) partial[t] = norm_tile(a, i, n, y);
      out.write(i, n, y);
    }
    out.finish();
  }
  if (a.norm != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      const double sum = sum_of_partials(partial + g * group_tiles, group_tiles);
      static_cast<T*>(a.norm)[g] = static_cast<T>(std::sqrt(sum / static_cast<double>(group_elements)));
    }
  }
  return Status::ok;
}

}  // namespace

Status combine(const CombineArguments& a) {
  return a.dtype == Dtype::f64 ? combine_as<double>(a) : combine_as<float>(a);
}

}  // namespace FM_ISA
}  // namespace fm

FM_ENTRY_POINTS(combine, fm::CombineArguments)
