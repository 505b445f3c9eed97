// What one thread of step_rows_cuda does; see step_control/step_control.h.
#pragma once

#include "../common/range.cuh"
#include "step_control_body.h"

namespace fm {

template <typename A>
struct StepRowsParams {
  StepRowsArguments a;
  Divider by_inner;
  int64_t elements;
  bool streaming;
};

template <typename A>
StepRowsParams<A> make_step_rows_params(const StepRowsArguments& a) {
  const int64_t elements = a.rows * a.inner;
  return {a, make_divider(a.inner), elements, elements * bytes_of(a.dtype) >= streaming_bytes_cuda};
}

// V elements a thread. whole: all of one row; else some are of two, and are taken one by one.
template <Dtype dtype_, int V_, bool whole_ = true>
struct StepRowsShape {
  static constexpr Dtype dtype = dtype_;
  static constexpr int V = V_;
  static constexpr bool whole = whole_;
  static constexpr int64_t tile = static_cast<int64_t>(block_threads) * V;
  using A = std::conditional_t<dtype == Dtype::f64, double, float>;
};

template <Dtype dtype, int V, typename A>
FM_HOST_DEVICE void load_elements(const void* data, int64_t i, A (&out)[V]) {
  if constexpr (V == 1)
    out[0] = load_scalar<A>(data, dtype, i);
  else
    unpack<dtype, V>(load_packed<V * bytes_of(dtype)>(data, i * bytes_of(dtype)), out);
}

template <Dtype dtype, int V, typename A>
FM_HOST_DEVICE void store_elements(void* data, int64_t i, const A (&values)[V], bool streaming) {
  if constexpr (V == 1)
    store_scalar(data, dtype, i, values[0]);
  else
    store_packed<V * bytes_of(dtype)>(data, i * bytes_of(dtype), pack<dtype, V>(values), streaming);
}

// Bits, not values: what is no number stays as it is.
template <Dtype dtype, int V>
FM_HOST_DEVICE void copy_elements(const void* from, void* to, int64_t i, bool streaming) {
  if constexpr (V > 1) {
    constexpr int bytes = V * bytes_of(dtype);
    store_packed<bytes>(to, i * bytes_of(dtype), load_packed<bytes>(from, i * bytes_of(dtype)), streaming);
  } else if constexpr (dtype == Dtype::f64) {
    static_cast<uint64_t*>(to)[i] = static_cast<const uint64_t*>(from)[i];
  } else if constexpr (dtype == Dtype::f32) {
    static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
  } else {
    static_cast<uint16_t*>(to)[i] = static_cast<const uint16_t*>(from)[i];
  }
}

template <typename A>
struct StepRowsBody {
  const StepRowsParams<A>& p;
  const StepRowsArguments& a;
  int64_t row;
  int32_t first, next;  // requested times within the step
  bool accept;

  FM_HOST_DEVICE StepRowsBody(const StepRowsParams<A>& params, int64_t row_) : p(params), a(params.a), row(row_) {
    const int32_t* count = a.count + row;
    accept = count[at_accept * a.rows] != 0;
    const bool outputs = accept && a.wanted.times != nullptr;
    first = outputs ? count[at_first_output * a.rows] : 0;
    next = outputs ? count[at_next_output * a.rows] : 0;
  }

  FM_HOST_DEVICE double time(int32_t j) const { return a.wanted.times[row * a.wanted.stride + j]; }
  FM_HOST_DEVICE bool at_end(int32_t j) const { return time(j) == a.clock[at_t * a.rows + row]; }

  // Stage s's weight in the output at time number j.
  FM_HOST_DEVICE A weight(int32_t j, int s) const {
    const double t = a.clock[at_t_from * a.rows + row], h = a.clock[at_h_taken * a.rows + row];
    return static_cast<A>(dense_weight(a.polynomials[s], a.degree, (time(j) - t) / h, h));
  }

  // Elements i .. i + V - 1 at time number j; `weights` of all stages, or null to compute them here.
  template <typename Shape>
  FM_HOST_DEVICE void output(int64_t i, int32_t j, const A* weights) const {
    constexpr Dtype dtype = Shape::dtype;
    constexpr int V = Shape::V;
    A sum[V];
    if (at_end(j)) {
      load_elements<dtype, V>(a.y1, i, sum);
    } else {
      load_elements<dtype, V>(a.y, i, sum);
      FM_ROLLED
      for (int s = 0; s < a.stages; ++s) {
        const A w = weights != nullptr ? weights[s] : weight(j, s);
        if (w == 0) continue;
        A k[V];
        load_elements<dtype, V>(a.k[s], i, k);
        FM_UNROLL
        for (int v = 0; v < V; ++v) sum[v] = multiply_add(w, k[v], sum[v]);
      }
    }
    const int64_t place = a.ids == nullptr ? row : a.ids[row];
    store_elements<dtype, V>(a.out, j * a.out_stride + place * a.inner + (i - row * a.inner), sum, p.streaming);
  }

  template <typename Shape>
  FM_HOST_DEVICE void move(int64_t i) const {
    constexpr Dtype dtype = Shape::dtype;
    constexpr int V = Shape::V;
    if (!a.move) return;
    if (accept) {
      copy_elements<dtype, V>(a.y1, a.y, i, p.streaming);
      copy_elements<dtype, V>(a.k_last, a.k0, i, p.streaming);
    } else if (a.k0_from != a.k0) {
      copy_elements<dtype, V>(a.k0_from, a.k0, i, p.streaming);
    }
  }
};

// Moves elements i .. i + V - 1, up to `last`: together where all are of one row.
template <typename Shape>
FM_HOST_DEVICE void move_run(const StepRowsParams<typename Shape::A>& p, int64_t i, int64_t last) {
  using Body = StepRowsBody<typename Shape::A>;
  const int64_t end = i + Shape::V - 1, row = p.by_inner.divide(i);
  if (p.by_inner.divide(end) == row) {  // past the last element it is another one
    Body(p, row).template move<Shape>(i);
  } else {
    FM_ROLLED
    for (int64_t e = i; e <= end && e <= last; ++e)
      Body(p, p.by_inner.divide(e)).template move<StepRowsShape<Shape::dtype, 1>>(e);
  }
}

// Calls visit(Shape{}) with what suits a call.
template <Dtype dtype, typename Visit>
auto choose_step_rows_shape(const StepRowsArguments& a, Visit visit) {
  constexpr int V = vector_length(dtype);
  const bool moves =
      is_aligned(a.y) && is_aligned(a.y1) && is_aligned(a.k0) && is_aligned(a.k0_from) && is_aligned(a.k_last);
  bool vectors = moves && a.inner % V == 0 && is_aligned(a.out) && a.out_stride % V == 0;
  for (int s = 0; s < a.stages; ++s) vectors = vectors && is_aligned(a.k[s]);
  if (vectors) return visit(StepRowsShape<dtype, V>{});
  // outputs, which are rarer than moves, element by element
  if (moves && a.inner >= V) return visit(StepRowsShape<dtype, V, false>{});
  return visit(StepRowsShape<dtype, 1>{});
}

template <typename Visit>
auto choose_step_rows_shape(const StepRowsArguments& a, Visit visit) {
  if (a.dtype == Dtype::f32) return choose_step_rows_shape<Dtype::f32>(a, visit);
  if (a.dtype == Dtype::bf16) return choose_step_rows_shape<Dtype::bf16>(a, visit);
  if (a.dtype == Dtype::f16) return choose_step_rows_shape<Dtype::f16>(a, visit);
  return choose_step_rows_shape<Dtype::f64>(a, visit);
}

}  // namespace fm
