// What one thread of combine_cuda does; see combine/combine.h.
#pragma once

#include "../common/range.cuh"
#include "combine.h"
#include "error_ratio.h"

namespace fm {

template <typename A>
struct CombineParams {
  LinearOperand<A> operands[max_operands];
  int count;
  Dtype dtype;
  void* out;
  Rows rows;
  int64_t elements;
  bool vectors;  // elements may be taken in vectors
  bool streaming;
  bool skip_ones;  // in place, one operand, no norm: where its coefficient is 1 nothing is read or written
  bool use_error;
  A atol, rtol;
  Partition partition;  // where there is a norm
  int64_t row_tiles;    // of a row, where blocks take parts of rows (see in_rows); else 0
  Divider by_row_tiles;
};

template <typename A>
CombineParams<A> make_combine_params(const CombineArguments& a) {
  CombineParams<A> p{};
  const bool with_norm = a.norm != nullptr;
  p.use_error = with_norm && a.has_error;
  for (int k = 0; k < a.count; ++k) p.operands[k] = make_operand<A>(a.operands[k], p.use_error);
  p.count = a.count;
  p.dtype = a.dtype;
  p.out = a.out;
  p.rows = make_rows(a.inner);
  p.elements = a.rows * a.inner;
  p.vectors = a.inner >= vector_length(a.dtype) && is_aligned(a.out) && are_aligned(a.operands, a.count);
  p.streaming = p.elements * bytes_of(a.dtype) >= streaming_bytes_cuda;
  p.skip_ones = a.count == 1 && a.out == a.operands[0].data && !with_norm;
  p.atol = static_cast<A>(a.atol);
  p.rtol = static_cast<A>(a.rtol);
  if (with_norm) p.partition = make_partition(p.elements, a.samples);
  return p;
}

// The tiles of a call without a norm. Noise costs more than what it is added to: blocks then take parts of single rows,
// whose coefficients are looked up once, unless rows are so short that most of a block would idle.
template <typename Shape>
int64_t make_tiles(const CombineArguments& a, CombineParams<typename Shape::A>& p) {
  constexpr int64_t least = static_cast<int64_t>(block_threads) * Shape::V;
  if (Shape::noise && p.vectors && a.inner >= least && a.inner % Shape::V == 0 &&
      has_whole_blocks(a.operands, a.count)) {
    p.row_tiles = (a.inner + Shape::tile - 1) / Shape::tile;
    p.by_row_tiles = make_divider(p.row_tiles);
    return p.row_tiles * a.rows;
  }
  return (p.elements + Shape::tile - 1) / Shape::tile;
}

template <typename A>
Finish<A> make_norm_finish(const CombineArguments& a) {
  return {static_cast<A*>(a.norm), true, a.rows * a.inner / a.samples, 1, Lookup<A>{}};
}

// chunk: operands whose loads are in flight together.
template <Dtype dtype_, int U_, int chunk_, bool noise_, bool norm_>
struct CombineShape {
  static constexpr Dtype dtype = dtype_;
  static constexpr int V = vector_length(dtype), U = U_, chunk = chunk_;
  static constexpr bool noise = noise_, norm = norm_;
  static constexpr int64_t tile = static_cast<int64_t>(block_threads) * V * U;
  using A = std::conditional_t<dtype == Dtype::f64, double, float>;
};

template <typename Shape>
struct CombineBody {
  using A = typename Shape::A;
  static constexpr int V = Shape::V, U = Shape::U;
  const CombineParams<A>& p;
  Tally<A> tally;

  // `step` elements apart, all in one row.
  FM_HOST_DEVICE void in_row(int64_t row, int64_t first, int64_t end) {
    constexpr int step = block_threads * V;
    const int left = static_cast<int>(end - first);
    int64_t at[U];
    bool active[U];
    FM_UNROLL
    for (int u = 0; u < U; ++u) {
      at[u] = first + u * step;
      active[u] = u * step < left;
    }
    LinearVectors<A, V, U, false> sum;
    linear_vectors<Shape::dtype, V, U, Shape::chunk, true, false>(p.operands, p.count, false, OneRow{row}, at, active,
                                                                  p.streaming, sum);
    FM_UNROLL
    for (int u = 0; u < U; ++u)
      if (active[u]) store(at[u], sum.y[u]);
  }

  FM_HOST_DEVICE void store(int64_t at, const A (&y)[V]) {
    store_packed<V * bytes_of(Shape::dtype)>(p.out, at * bytes_of(Shape::dtype), pack<Shape::dtype, V>(y), p.streaming);
  }

  FM_HOST_DEVICE bool unchanged(int64_t row) const { return p.skip_ones && p.operands[0].coefficient.at(row) == A(1); }

  template <int U>
  FM_HOST_DEVICE void vectors(const int64_t (&at)[U], const bool (&active_)[U]) {
    constexpr Dtype dtype = Shape::dtype;
    bool active[U];
    FM_UNROLL
    for (int u = 0; u < U; ++u) active[u] = active_[u];
    if constexpr (Shape::chunk == 1 && !Shape::noise) {
      if (p.skip_ones) {
        FM_UNROLL
        for (int u = 0; u < U; ++u) {
          const Position position = p.rows.template at<V>(at[u]);
          active[u] = active[u] && !(position.left >= V && unchanged(position.row));
        }
      }
    }
    LinearVectors<A, V, U, Shape::norm> sum;
    linear_vectors<dtype, V, U, Shape::chunk, Shape::noise, Shape::norm>(p.operands, p.count, p.use_error, p.rows, at,
                                                                         active, p.streaming, sum);
    FM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!active[u]) continue;
      if constexpr (Shape::norm) {
        A square[V];
        FM_UNROLL
        for (int j = 0; j < V; ++j)
          square[j] =
              error_square(p.use_error ? sum.error[u][j] : sum.y[u][j], sum.first[u][j], sum.y[u][j], p.atol, p.rtol);
        tally.add(at[u], square);
      }
      store(at[u], sum.y[u]);
    }
  }

  FM_HOST_DEVICE void scalar(int64_t i) {
    const int64_t row = p.rows.divider.divide(i);
    if (unchanged(row)) return;
    const LinearScalar<A> sum = linear_scalar(p.operands, p.count, p.use_error, Shape::dtype, row, i);
    if constexpr (Shape::norm)
      tally.add(i, error_square(p.use_error ? sum.error : sum.y, sum.first, sum.y, p.atol, p.rtol));
    store_scalar(p.out, Shape::dtype, i, sum.y);
  }
};

// A block's share. `values`: where several samples share a block, its table.
template <typename Shape>
FM_HOST_DEVICE Tally<typename Shape::A> combine_thread(const CombineParams<typename Shape::A>& p, int64_t block,
                                                       int thread, typename Shape::A* values) {
  if constexpr (Shape::norm) {
    CombineBody<Shape> body{p, {0, values, p.partition.begin(block)}};
    for_partition<Shape::V, Shape::U>(p.partition, block, p.vectors, thread, body);
    return body.tally;
  } else {
    CombineBody<Shape> body{p, {0, values, 0}};
    if constexpr (Shape::noise) {
      if (p.row_tiles > 0) {
        const int64_t row = p.by_row_tiles.divide(block), in_row = (block - row * p.row_tiles) * Shape::tile;
        const int64_t first = in_row + thread * Shape::V, from = row * p.rows.inner;
        if (first < p.rows.inner) body.in_row(row, from + first, from + p.rows.inner);
        return body.tally;
      }
    }
    const int64_t begin = block * Shape::tile;
    const int64_t end = p.elements - begin < Shape::tile ? p.elements : begin + Shape::tile;
    for_range<Shape::V, Shape::noise ? 1 : Shape::U>(begin, end, p.vectors, thread, body);
    return body.tally;
  }
}

// Calls visit(Shape{}) with what suits a call; the same choice on the device and in its emulation.
template <Dtype dtype, typename Visit>
auto choose_combine_shape(const CombineArguments& a, Visit visit) {
  // U keeps about four 16-byte loads of a thread in flight, as far as registers go.
  constexpr int U = dtype == Dtype::f64 ? 1 : 2;
  if (a.norm != nullptr) return visit(CombineShape<dtype, 1, 4, true, true>{});
  if (has_noise(a.operands, a.count))
    return visit(CombineShape<dtype, dtype == Dtype::f64 ? 1 : 16 / vector_length(dtype), 1, true, false>{});
  if (a.count == 1) return visit(CombineShape<dtype, dtype == Dtype::f32 ? 4 : 2, 1, false, false>{});
  if (a.count == 2) return visit(CombineShape<dtype, U, 2, false, false>{});
  return visit(CombineShape<dtype, 1, 4, false, false>{});
}

template <typename Visit>
auto choose_combine_shape(const CombineArguments& a, Visit visit) {
  if (a.dtype == Dtype::f32) return choose_combine_shape<Dtype::f32>(a, visit);
  if (a.dtype == Dtype::bf16) return choose_combine_shape<Dtype::bf16>(a, visit);
  if (a.dtype == Dtype::f16) return choose_combine_shape<Dtype::f16>(a, visit);
  return choose_combine_shape<Dtype::f64>(a, visit);
}

}  // namespace fm
