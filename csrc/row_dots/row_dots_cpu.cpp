#include "../common/cpu_tile.h"
#include "../common/isa.h"
#include "row_dots.h"

namespace fm {
namespace FM_ISA {
namespace {

// Rows shorter than this share a tile.
constexpr int64_t small_row = 256;

// sum_j a_j b_j for the n <= tile_elements elements of a stretch. Four vectors of sums are in flight, as many as hide
// the latency of an addition; one reads the other's neighbours, so that memory is read in order.
template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t width = 64 / sizeof(T);
  alignas(64) T s0[width] = {}, s1[width] = {}, s2[width] = {}, s3[width] = {};
  int64_t j = 0;
  for (; j + 4 * width <= n; j += 4 * width) {
#pragma omp simd
    for (int64_t l = 0; l < width; ++l) {
      s0[l] += a[j + l] * b[j + l];
      s1[l] += a[j + width + l] * b[j + width + l];
      s2[l] += a[j + 2 * width + l] * b[j + 2 * width + l];
      s3[l] += a[j + 3 * width + l] * b[j + 3 * width + l];
    }
  }
  for (; j + width <= n; j += width) {
#pragma omp simd
    for (int64_t l = 0; l < width; ++l) s0[l] += a[j + l] * b[j + l];
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < width; ++l) sum += (s0[l] + s1[l]) + (s2[l] + s3[l]);
  for (; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// The same for whole rows of a few elements, side by side in a vector: the sum of row r goes to out[r * stride].
template <int inner, typename T>
void dots_of(const T* a, const T* b, int64_t rows, T* out, int64_t stride) {
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    T sum = a[r * inner] * b[r * inner];
    for (int k = 1; k < inner; ++k) sum += a[r * inner + k] * b[r * inner + k];
    out[r * stride] = sum;
  }
}

// For longer rows: each is folded into `lanes` sums, which are then added side by side.
template <typename T>
void dots_folded(const T* a, const T* b, int64_t rows, int64_t inner, T* out, int64_t stride) {
  constexpr int64_t lanes = 8;
  alignas(64) T folded[tile_elements / (lanes + 1) * lanes], ones[tile_elements / (lanes + 1) * lanes];
  for (int64_t r = 0; r < rows; ++r, a += inner, b += inner) {
    T* sums = folded + r * lanes;
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) sums[l] = a[l] * b[l];
    int64_t j = lanes;
    for (; j + lanes <= inner; j += lanes) {
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) sums[l] += a[j + l] * b[j + l];
    }
    for (int64_t l = 0; j < inner; ++l, ++j) sums[l] += a[j] * b[j];
  }
  for (int64_t j = 0; j < rows * lanes; ++j) ones[j] = 1;
  dots_of<lanes>(folded, ones, rows, out, stride);
}

template <typename T>
void dots(const T* a, const T* b, int64_t rows, int64_t inner, T* out, int64_t stride) {
  switch (inner) {
    case 1:
      return dots_of<1>(a, b, rows, out, stride);
    case 2:
      return dots_of<2>(a, b, rows, out, stride);
    case 3:
      return dots_of<3>(a, b, rows, out, stride);
    case 4:
      return dots_of<4>(a, b, rows, out, stride);
    case 5:
      return dots_of<5>(a, b, rows, out, stride);
    case 6:
      return dots_of<6>(a, b, rows, out, stride);
    case 7:
      return dots_of<7>(a, b, rows, out, stride);
    case 8:
      return dots_of<8>(a, b, rows, out, stride);
    default:
      return dots_folded(a, b, rows, inner, out, stride);
  }
}

// A tile of every tensor as T; at index -1 the ones.
template <typename T>
class Tiles {
 public:
  Tiles(const RowDotsArguments& a, const T* ones, int64_t i, int64_t n) {
    values_[0] = ones;
    for (int k = 0; k < a.count; ++k) values_[k + 1] = load(a.tensors[k], a.dtype, i, n, buffers_[k]);
  }
  const T* operator[](int k) const { return values_[k + 1]; }

 private:
  const T* values_[max_dot_tensors + 1];
  alignas(64) T buffers_[max_dot_tensors][tile_elements];
};

template <typename T>
Status row_dots_as(const RowDotsArguments& a) {
  const int64_t elements = a.rows * a.inner;
  const bool several = a.inner < small_row;
  const int64_t step = several ? tile_elements / a.inner * a.inner : tile_elements;
  const int64_t row_tiles = several ? 1 : (a.inner + step - 1) / step;
  const int64_t tiles = several ? (elements + step - 1) / step : a.rows * row_tiles;
  alignas(64) T ones[tile_elements];
  for (int64_t j = 0, n = minimum(tile_elements, elements); j < n; ++j) ones[j] = 1;
  const Partials partials(row_tiles == 1 ? 0 : tiles * a.pairs);
  double* partial = partials.data;
  T* out = static_cast<T*>(a.out);
#pragma omp parallel for schedule(static) if (elements > parallel_elements)
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = several ? 0 : t % row_tiles * step;
    const int64_t i = several ? t * step : t / row_tiles * a.inner + begin;
    const int64_t n = several ? minimum(step, elements - i) : minimum(step, a.inner - begin);
    const Tiles<T> tile(a, ones, i, n);
    for (int p = 0; p < a.pairs; ++p) {
      const T *x = tile[a.first[p]], *y = tile[a.second[p]];
      if (several)
        dots(x, y, n / a.inner, a.inner, out + i / a.inner * a.pairs + p, a.pairs);
      else if (row_tiles == 1)
        out[t * a.pairs + p] = dot(x, y, n);
      else
        partial[t * a.pairs + p] = static_cast<double>(dot(x, y, n));
    }
  }
  for (int64_t k = 0; row_tiles > 1 && k < a.rows * a.pairs; ++k) {
    const int64_t row = k / a.pairs, p = k % a.pairs;
    out[k] = static_cast<T>(sum_of_partials(partial + row * row_tiles * a.pairs + p, row_tiles, a.pairs));
  }
  return Status::ok;
}

}  // namespace

Status row_dots(const RowDotsArguments& a) {
  if (!valid(a)) return Status::bad_argument;
  if (a.rows * a.inner == 0) return Status::ok;
  return a.dtype == Dtype::f64 ? row_dots_as<double>(a) : row_dots_as<float>(a);
}

}  // namespace FM_ISA
}  // namespace fm

FM_ENTRY_POINTS(row_dots, fm::RowDotsArguments)
