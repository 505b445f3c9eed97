// What one thread of row_dots_cuda does; see row_dots/row_dots.h.
//
// A thread keeps a sum for every product of two tensors, and of a tensor and ones, wanted or not: registers cannot be
// indexed by a pair that is known at run time only, and the arithmetic hides behind the loads.
#pragma once

#include "../common/range.cuh"
#include "row_dots.h"

namespace fm {

// Products of count tensors: (i, j) with -1 <= i <= j, 0 <= j < count, where -1 stands for ones.
constexpr int product_count(int count) { return count * (count + 3) / 2; }
FM_HOST_DEVICE constexpr int product_index(int i, int j) { return j * (j + 3) / 2 + i + 1; }

template <typename A>
struct RowDotsParams {
  const void* tensors[max_dot_tensors];
  int count;
  int64_t rows, inner;
  bool vectors;  // elements may be taken in vectors
  int pairs;
  int product[max_dot_pairs];  // of a pair; -1: ones with ones
  uint32_t wanted;             // products, a bit each
  A* out;
  double* workspace;
  int lanes;  // threads that share a row; 0: a row is for one block or several
  bool runs;  // of V elements are what each of these takes, else single elements
  Partition partition;
};

// N: tensors that there are registers for.
template <Dtype dtype_, int N_>
struct RowDotsShape {
  static constexpr Dtype dtype = dtype_;
  static constexpr int N = N_, V = dtype == Dtype::f64 ? 2 : vector_length(dtype);
  static constexpr int U = N == 1 && V < 8 ? 4 : N <= 2 ? 2 : 1;  // some four loads of a thread are in flight
  static constexpr int products = product_count(N);
  using A = std::conditional_t<dtype == Dtype::f64, double, float>;
};

template <typename Shape>
RowDotsParams<typename Shape::A> make_row_dots_params(const RowDotsArguments& a) {
  using A = typename Shape::A;
  RowDotsParams<A> p{};
  p.count = a.count;
  p.rows = a.rows;
  p.inner = a.inner;
  p.vectors = true;
  for (int k = 0; k < a.count; ++k) {
    p.tensors[k] = a.tensors[k];
    p.vectors = p.vectors && is_aligned(a.tensors[k]);
  }
  p.pairs = a.pairs;
  for (int q = 0; q < a.pairs; ++q) {
    const int low = a.first[q] < a.second[q] ? a.first[q] : a.second[q];
    const int high = a.first[q] < a.second[q] ? a.second[q] : a.first[q];
    p.product[q] = high < 0 ? -1 : product_index(low, high);
    if (high >= 0) p.wanted |= uint32_t{1} << p.product[q];
  }
  p.out = static_cast<A*>(a.out);
  p.workspace = static_cast<double*>(a.workspace);
  p.partition = make_partition(a.rows * a.inner, a.rows);
  if (a.inner <= small_group) {
    p.runs = a.inner % Shape::V == 0;
    p.lanes = 1;
    while (p.lanes < 32 && 2 * p.lanes * (p.runs ? Shape::V : 2) <= a.inner) p.lanes *= 2;
  }
  return p;
}

template <typename Shape>
struct RowDotsBody {
  using A = typename Shape::A;
  static constexpr int N = Shape::N, V = Shape::V, U = Shape::U;
  const RowDotsParams<A>& p;
  A sums[Shape::products];

  FM_HOST_DEVICE bool given(int k) const { return N <= 2 || k < p.count; }

  FM_HOST_DEVICE void add(const A (&x)[N]) {
    FM_UNROLL
    for (int j = 0; j < N; ++j) {
      sums[product_index(-1, j)] += x[j];
      FM_UNROLL
      for (int i = 0; i <= j; ++i) sums[product_index(i, j)] = multiply_add(x[i], x[j], sums[product_index(i, j)]);
    }
  }

  template <int count>
  FM_HOST_DEVICE void take(const int64_t (&at)[count], const bool (&active)[count]) {
    constexpr int bytes = V * bytes_of(Shape::dtype);
    Packed<bytes> packed[N][count]{};
    FM_UNROLL
    for (int k = 0; k < N; ++k) {
      FM_UNROLL
      for (int u = 0; u < count; ++u)
        if (given(k) && active[u]) packed[k][u] = load_packed<bytes>(p.tensors[k], at[u] * bytes_of(Shape::dtype));
    }
    FM_UNROLL
    for (int u = 0; u < count; ++u) {
      A values[N][V];
      FM_UNROLL
      for (int k = 0; k < N; ++k) unpack<Shape::dtype, V>(packed[k][u], values[k]);
      FM_UNROLL
      for (int j = 0; j < V; ++j) {
        A x[N];
        FM_UNROLL
        for (int k = 0; k < N; ++k) x[k] = values[k][j];
        add(x);
      }
    }
  }

  FM_HOST_DEVICE void vectors(const int64_t (&at)[U], const bool (&active)[U]) { take(at, active); }

  FM_HOST_DEVICE void scalar(int64_t i) {
    A x[N];
    FM_UNROLL
    for (int k = 0; k < N; ++k) x[k] = given(k) ? load_scalar<A>(p.tensors[k], Shape::dtype, i) : A(0);
    add(x);
  }
};

// A block's share of a row.
template <typename Shape>
FM_HOST_DEVICE RowDotsBody<Shape> row_dots_thread(const RowDotsParams<typename Shape::A>& p, int64_t block,
                                                  int thread) {
  RowDotsBody<Shape> body{p, {}};
  for_partition<Shape::V, Shape::U>(p.partition, block, p.vectors, thread, body);
  return body;
}

// A lane's share of a short row.
template <typename Shape>
FM_HOST_DEVICE RowDotsBody<Shape> row_dots_lane(const RowDotsParams<typename Shape::A>& p, int64_t row, int lane) {
  RowDotsBody<Shape> body{p, {}};
  if (row >= p.rows) return body;
  const int64_t begin = row * p.inner, end = begin + p.inner;
  if (p.runs) {
    FM_ROLLED
    for (int64_t i = begin + lane * Shape::V; i < end; i += p.lanes * Shape::V) {
      const int64_t at[1] = {i};
      const bool active[1] = {true};
      if (p.vectors) {
        body.template take<1>(at, active);
      } else {
        FM_ROLLED
        for (int64_t j = i; j < i + Shape::V; ++j) body.scalar(j);
      }
    }
  } else {
    FM_ROLLED
    for (int64_t i = begin + lane; i < end; i += p.lanes) body.scalar(i);
  }
  return body;
}

// Calls visit(Shape{}) with what suits a call; the same choice on the device and in its emulation.
template <Dtype dtype, typename Visit>
auto choose_row_dots_shape(const RowDotsArguments& a, Visit visit) {
  if (a.count == 1) return visit(RowDotsShape<dtype, 1>{});
  if (a.count == 2) return visit(RowDotsShape<dtype, 2>{});
  if (a.count <= 4) return visit(RowDotsShape<dtype, 4>{});
  return visit(RowDotsShape<dtype, max_dot_tensors>{});
}

template <typename Visit>
auto choose_row_dots_shape(const RowDotsArguments& a, Visit visit) {
  if (a.dtype == Dtype::f32) return choose_row_dots_shape<Dtype::f32>(a, visit);
  if (a.dtype == Dtype::bf16) return choose_row_dots_shape<Dtype::bf16>(a, visit);
  if (a.dtype == Dtype::f16) return choose_row_dots_shape<Dtype::f16>(a, visit);
  return choose_row_dots_shape<Dtype::f64>(a, visit);
}

}  // namespace fm
