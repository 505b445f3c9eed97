// What one thread of regression_loss_cuda does; see regression_loss/regression_loss.h.
#pragma once

#include "../common/range.cuh"
#include "regression_loss.h"

namespace fm {

template <typename A>
struct LossParams {
  LinearOperand<A> operands[max_loss_operands];
  int count;
  Dtype dtype, pred_dtype;
  const void* pred;
  void* grad;
  Rows rows;
  Lookup<A> weight, scale;
  bool scale_grad;
  const uint8_t* mask;
  bool mask_by_element;
  Divider mask_rows;  // rows that one entry covers
  Penalty kind;
  A delta;
  bool vectors;       // elements may be taken in vectors
  bool whole_blocks;  // noise begins with a block
  bool streaming;
  Partition partition;
};

// pred_dtype and dtype: of calls whose elements may be taken in vectors.
template <Dtype pred_dtype_, Dtype dtype_, int U_, bool noise_>
struct LossShape {
  static constexpr Dtype pred_dtype = pred_dtype_, dtype = dtype_;
  static constexpr bool noise = noise_, scalar = false;
  static constexpr int U = U_;
  // 16 bytes of the wider dtype
  static constexpr int V =
      vector_length(pred_dtype) < vector_length(dtype) ? vector_length(pred_dtype) : vector_length(dtype);
  using A = std::conditional_t<pred_dtype == Dtype::f64 || dtype == Dtype::f64, double, float>;
};

// Every other pair of dtypes: element by element.
template <typename A_>
struct ScalarLossShape {
  static constexpr bool scalar = true, noise = false;
  static constexpr int U = 1, V = 4;
  using A = A_;
};

template <typename Shape>
LossParams<typename Shape::A> make_loss_params(const RegressionLossArguments& a) {
  using A = typename Shape::A;
  LossParams<A> p{};
  for (int k = 0; k < a.count; ++k) p.operands[k] = make_operand<A>(a.operands[k], false);
  p.count = a.count;
  p.dtype = a.dtype;
  p.pred_dtype = a.pred_dtype;
  p.pred = a.pred;
  p.grad = a.grad;
  p.rows = make_rows(a.inner);
  p.weight = make_lookup<A>(a.weight);
  p.scale = make_lookup<A>(a.scale);
  p.scale_grad = a.scale_grad;
  p.mask = reinterpret_cast<const uint8_t*>(a.mask);
  p.mask_by_element = a.mask != nullptr && a.mask_elements < a.inner;
  p.mask_rows = make_divider(a.mask == nullptr || p.mask_by_element ? 1 : a.mask_elements / a.inner);
  p.kind = a.kind;
  p.delta = bend<A>(a.delta);
  p.vectors = !Shape::scalar && a.inner >= Shape::V && is_aligned(a.pred) && is_aligned(a.grad) &&
              are_aligned(a.operands, a.count) && (!p.mask_by_element || is_aligned(a.mask));
  p.whole_blocks = has_whole_blocks(a.operands, a.count);
  p.partition = make_partition(a.rows * a.inner, a.groups);
  p.streaming = p.partition.elements * bytes_of(a.pred_dtype) >= streaming_bytes_cuda;
  return p;
}

template <typename A>
Finish<A> make_loss_finish(const RegressionLossArguments& a) {
  return {static_cast<A*>(a.loss), false, a.rows * a.inner / a.groups, a.rows / a.groups, make_lookup<A>(a.scale)};
}

template <Penalty kind, int V, typename A>
FM_HOST_DEVICE void penalties_of(A delta, A (&d)[V], A (&value)[V]) {
  FM_UNROLL
  for (int j = 0; j < V; ++j) {
    A derivative;
    penalty<kind>(d[j], delta, value[j], derivative);
    d[j] = derivative;
  }
}

// Replaces the residuals d by rho'(d), and writes rho(d).
template <int V, typename A>
FM_HOST_DEVICE void penalties(Penalty kind, A delta, A (&d)[V], A (&value)[V]) {
  if (kind == Penalty::squared)
    penalties_of<Penalty::squared>(delta, d, value);
  else if (kind == Penalty::huber)
    penalties_of<Penalty::huber>(delta, d, value);
  else if (kind == Penalty::pseudo_huber)
    penalties_of<Penalty::pseudo_huber>(delta, d, value);
  else
    penalties_of<Penalty::l1>(delta, d, value);
}

template <typename Shape>
struct LossBody {
  using A = typename Shape::A;
  static constexpr int V = Shape::V, U = Shape::U;
  const LossParams<A>& p;
  Tally<A> tally;

  FM_HOST_DEVICE bool row_kept(int64_t row) const {
    return p.mask == nullptr || p.mask_by_element || p.mask[p.mask_rows.divide(row)] != 0;
  }

  FM_HOST_DEVICE void vectors(const int64_t (&at)[U], const bool (&active)[U]) {
    if constexpr (Shape::scalar) {
    } else if constexpr (Shape::noise) {
      // Drawn numbers are worth a way of their own where a thread's vectors lie in one row. The others are taken one
      // by one, which adds up the same values in the same order.
      constexpr int64_t step = static_cast<int64_t>(block_threads) * V;
      int64_t last = at[0];
      FM_UNROLL
      for (int u = 1; u < U; ++u)
        if (active[u]) last = at[u];
      const int64_t row = p.rows.divider.divide(at[0]);
      if (p.whole_blocks && last + V <= (row + 1) * p.rows.inner) {
        vectors_at(at, active, OneRow{row});
      } else {
        FM_ROLLED
        for (int64_t i = at[0]; i <= last; i += step) vectors_at<1>({i}, {true}, p.rows);
      }
    } else {
      vectors_at(at, active, p.rows);
    }
  }

  template <int U, typename Place>
  FM_HOST_DEVICE void vectors_at(const int64_t (&at)[U], const bool (&active)[U], const Place& place) {
    constexpr Dtype dtype = Shape::dtype, pred_dtype = Shape::pred_dtype;
    constexpr bool one_row = std::is_same_v<Place, OneRow>;
    Packed<V * bytes_of(pred_dtype)> pred[U];
    Packed<V> mask[U] = {};
    FM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (active[u]) pred[u] = load_packed<V * bytes_of(pred_dtype)>(p.pred, at[u] * bytes_of(pred_dtype));
      if (active[u] && p.mask_by_element) mask[u] = load_packed<V>(p.mask, at[u]);
    }
    LinearVectors<A, V, U, false> target;
    linear_vectors<dtype, V, U, Shape::noise ? 1 : max_loss_operands, Shape::noise, false>(
        p.operands, p.count, false, place, at, active, p.streaming, target);
    Factors once{};
    if constexpr (one_row) once = factors(target.position[0]);
    FM_UNROLL
    for (int u = 0; u < U; ++u)
      if (active[u]) finish_vector<one_row>(at[u], target.position[u], once, pred[u], mask[u], target.y[u]);
  }

  // What the values and derivatives of a vector are multiplied by, and whether its rows are kept.
  struct Factors {
    Pair<A> value, derivative;
    bool kept;
  };

  FM_HOST_DEVICE Factors factors(const Position& position) const {
    Factors f;
    f.value = f.derivative = look_up<V>(p.weight, position);
    if (p.scale_grad) {
      const Pair<A> scale = look_up<V>(p.scale, position);
      f.derivative.before = gradient_factor(f.value.before, scale.before, true);
      f.derivative.after = gradient_factor(f.value.after, scale.after, true);
    }
    f.kept = row_kept(position.row);
    return f;
  }

  // The same for both ways of taking elements, so that they agree to the last bit.
  FM_HOST_DEVICE static A gradient_factor(A weight, A scale, bool scale_grad) {
    return scale_grad ? weight * scale : weight;
  }

  template <bool one_row, int bytes>
  FM_HOST_DEVICE void finish_vector(int64_t i, const Position& position, const Factors& once, const Packed<bytes>& pred,
                                    const Packed<V>& mask, const A (&target)[V]) {
    A d[V], value[V];
    unpack<Shape::pred_dtype, V>(pred, d);
    FM_UNROLL
    for (int j = 0; j < V; ++j) d[j] -= target[j];
    penalties(p.kind, p.delta, d, value);
    const Factors f = one_row ? once : factors(position);
    const Pair<A>&weight = f.value, &factor = f.derivative;
    const bool split = position.left < V, kept = f.kept;
    // What is masked out is selected, not multiplied by 0: it may be NaN.
    if (split || p.mask_by_element) {
      const bool kept_after = split ? row_kept(position.row + 1) : kept;
      FM_UNROLL
      for (int j = 0; j < V; ++j) {
        bool keep = j < position.left ? kept : kept_after;
        if (p.mask_by_element) keep = (mask.words[j / 4] >> (8 * (j % 4)) & 0xFFu) != 0;
        value[j] = keep ? weight[j] * value[j] : A(0);
        d[j] = keep ? factor[j] * d[j] : A(0);
      }
    } else if (kept) {  // nearly always
      FM_UNROLL
      for (int j = 0; j < V; ++j) {
        value[j] = weight.before * value[j];
        d[j] = factor.before * d[j];
      }
    } else {
      FM_UNROLL
      for (int j = 0; j < V; ++j) value[j] = d[j] = A(0);
    }
    tally.add(i, value);
    if (p.grad != nullptr)
      store_packed<bytes>(p.grad, i * bytes_of(Shape::pred_dtype), pack<Shape::pred_dtype, V>(d), p.streaming);
  }

  FM_HOST_DEVICE void scalar(int64_t i) {
    const int64_t row = p.rows.divider.divide(i);
    A d[1], value[1];
    d[0] = load_scalar<A>(p.pred, p.pred_dtype, i) - linear_scalar(p.operands, p.count, false, p.dtype, row, i).y;
    penalties(p.kind, p.delta, d, value);
    const A weight = p.weight.at(row);
    const A factor = gradient_factor(weight, p.scale.at(row), p.scale_grad);
    const bool keep = p.mask_by_element ? p.mask[i] != 0 : row_kept(row);
    tally.add(i, keep ? weight * value[0] : A(0));
    if (p.grad != nullptr) store_scalar(p.grad, p.pred_dtype, i, keep ? factor * d[0] : A(0));
  }
};

// A block's share. `values`: where several groups share a block, its table.
template <typename Shape>
FM_HOST_DEVICE Tally<typename Shape::A> loss_thread(const LossParams<typename Shape::A>& p, int64_t block, int thread,
                                                    typename Shape::A* values) {
  LossBody<Shape> body{p, {0, values, p.partition.begin(block)}};
  for_partition<Shape::V, Shape::U>(p.partition, block, p.vectors, thread, body);
  return body.tally;
}

// Calls visit(Shape{}) with what suits a call; the same choice on the device and in its emulation.
template <Dtype pred_dtype, Dtype dtype, typename Visit>
auto choose_loss_shape(const RegressionLossArguments& a, Visit visit) {
  constexpr int U = LossShape<pred_dtype, dtype, 1, false>::V == 4 && pred_dtype != Dtype::f64 ? 2 : 1;
  constexpr int drawn = pred_dtype == Dtype::f64 ? 1 : 2;  // four of f32 would not leave the registers
  if (has_noise(a.operands, a.count)) return visit(LossShape<pred_dtype, dtype, drawn, true>{});
  return visit(LossShape<pred_dtype, dtype, U, false>{});
}

template <typename Visit>
auto choose_loss_shape(const RegressionLossArguments& a, Visit visit) {
  constexpr Dtype f32 = Dtype::f32, bf16 = Dtype::bf16, f16 = Dtype::f16, f64 = Dtype::f64;
  const Dtype pred = a.pred_dtype, data = a.dtype;
  if (pred == f32 && data == f32) return choose_loss_shape<f32, f32>(a, visit);
  if (pred == bf16 && data == bf16) return choose_loss_shape<bf16, bf16>(a, visit);
  if (pred == f16 && data == f16) return choose_loss_shape<f16, f16>(a, visit);
  if (pred == f64 && data == f64) return choose_loss_shape<f64, f64>(a, visit);
  if (pred == bf16 && data == f32) return choose_loss_shape<bf16, f32>(a, visit);
  if (pred == f16 && data == f32) return choose_loss_shape<f16, f32>(a, visit);
  if (pred == f32 && data == bf16) return choose_loss_shape<f32, bf16>(a, visit);
  if (pred == f32 && data == f16) return choose_loss_shape<f32, f16>(a, visit);
  if (pred == f64 || data == f64) return visit(ScalarLossShape<double>{});
  return visit(ScalarLossShape<float>{});
}

}  // namespace fm
