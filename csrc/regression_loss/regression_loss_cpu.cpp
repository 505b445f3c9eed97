#include "../common/cpu_tile.h"
#include "../common/isa.h"
#include "regression_loss.h"

namespace fm {
namespace FM_ISA {
namespace {

// Groups smaller than this share a tile.
constexpr int64_t small_group = 256;

// n elements of one row. Returns the sum of rho; writes the gradient where grad is given.
template <Penalty kind, typename T, typename In>
T row_loss(const In* pred, const T* target, T delta, T grad_weight, T* grad, int64_t n) {
  T sum = 0;
  if (grad == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      T value, derivative;
      penalty<kind>(widened<T>(pred[j]) - target[j], delta, value, derivative);
      sum += value;
    }
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    T value, derivative;
    penalty<kind>(widened<T>(pred[j]) - target[j], delta, value, derivative);
    sum += value;
    grad[j] = grad_weight * derivative;
  }
  return sum;
}

// The same with a weight and a mask entry an element; writes w rho to `values`.
template <Penalty kind, typename T>
void element_loss(const T* pred, const T* target, T delta, const T* w, const T* grad_weight, const uint8_t* keep,
                  T* values, T* grad, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T value, derivative;
    penalty<kind>(pred[j] - target[j], delta, value, derivative);
    values[j] = keep[j] ? w[j] * value : T(0);
    grad[j] = keep[j] ? grad_weight[j] * derivative : T(0);
  }
}

bool row_kept(const RegressionLossArguments& a, int64_t row) {
  return a.mask == nullptr || a.mask[row / (a.mask_elements / a.inner)];
}

// Elements i .. i + n - 1, row by row; returns sum mask w rho, without the scale.
template <Penalty kind, typename T, typename In>
double rows_tile(const RegressionLossArguments& a, int64_t i, int64_t n, const In* pred, const Output* grad) {
  Linear<T> linear;
  linear.load(a.operands, a.count, a.dtype, a.rows * a.inner, i, n);
  const T delta = bend<T>(a.delta);
  double total = 0;
  for_each_row(a.inner, i, n, [&](int64_t row, int64_t j, int64_t m) {
    if (!row_kept(a, row)) {
      if (grad != nullptr)
        grad->produce<T>(i + j, m, [](int64_t, int64_t length, T* out) {
          for (int64_t k = 0; k < length; ++k) out[k] = 0;
        });
      return;
    }
    linear.select_row(&Operand::coefficient, row);
    const T w = coefficient_at<T>(a.weight, row);
    const T grad_weight = a.scale_grad ? w * coefficient_at<T>(a.scale, row) : w;
    T sum = 0;
    alignas(64) T target[tile_elements];
    const auto fill = [&](int64_t first, int64_t length, T* out) {
      linear.template evaluate<false>(j + first, length, target);
      sum += row_loss<kind>(pred + j + first, target, delta, grad_weight, out, length);
    };
    if (grad != nullptr)
      grad->produce<T>(i + j, m, fill);
    else
      fill(0, m, nullptr);
    total += static_cast<double>(w) * static_cast<double>(sum);
  });
  return total;
}

// The same element by element, for short rows and elementwise masks; writes mask w rho to `values`.
template <Penalty kind, typename T>
void elements_tile(const RegressionLossArguments& a, int64_t i, int64_t n, const T* pred, T* values,
                   const Output* grad) {
  alignas(64) T target[tile_elements], w[tile_elements], grad_weight[tile_elements], derivative[tile_elements];
  alignas(64) uint8_t keep[tile_elements];
  linear_tile(a.operands, a.count, &Operand::coefficient, a.dtype, a.rows * a.inner, a.inner, i, n, target);
  expand(a.weight, a.inner, i, n, w);
  if (a.scale_grad) {
    expand(a.scale, a.inner, i, n, grad_weight);
    for (int64_t j = 0; j < n; ++j) grad_weight[j] *= w[j];
  } else {
    for (int64_t j = 0; j < n; ++j) grad_weight[j] = w[j];
  }
  if (a.mask == nullptr) {
    for (int64_t j = 0; j < n; ++j) keep[j] = 1;
  } else if (a.mask_elements == 1) {
    for (int64_t j = 0; j < n; ++j) keep[j] = a.mask[i + j];
  } else {
    for_each_row(a.mask_elements, i, n, [&](int64_t entry, int64_t j, int64_t m) {
      const bool kept = a.mask[entry];
      for (int64_t k = j; k < j + m; ++k) keep[k] = kept;
    });
  }
  element_loss<kind>(pred, target, bend<T>(a.delta), w, grad_weight, keep, values, derivative, n);
  if (grad != nullptr) grad->write(i, n, derivative);
}

template <Penalty kind, typename T>
Status loss_as(const RegressionLossArguments& a) {
  const int64_t elements = a.rows * a.inner;
  const int64_t group_elements = elements / a.groups;
  // A tile is a part of a group, or several small groups.
  const bool several = group_elements < small_group;
  const int64_t step = several ? tile_elements / group_elements * group_elements : tile_elements;
  const int64_t group_tiles = several ? 0 : (group_elements + step - 1) / step;
  const int64_t tiles = several ? (elements + step - 1) / step : a.groups * group_tiles;
  const bool by_element = several || a.inner < segment_elements || (a.mask != nullptr && a.mask_elements < a.inner);
  const Output out(a.grad, a.pred_dtype, elements);
  const Output* grad = a.grad == nullptr ? nullptr : &out;
  const Partials partials(several ? a.groups : tiles);
  double* partial = partials.data;
#pragma omp parallel for schedule(static) if (elements > parallel_elements)
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = several ? 0 : t % group_tiles * step;
    const int64_t i = several ? t * step : t / group_tiles * group_elements + begin;
    const int64_t n = several ? minimum(step, elements - i) : minimum(step, group_elements - begin);
    alignas(64) T pred_buffer[tile_elements], values[tile_elements];
    if (by_element) {
      elements_tile<kind>(a, i, n, load(a.pred, a.pred_dtype, i, n, pred_buffer), values, grad);
      const int64_t length = several ? group_elements : n;
      for (int64_t j = 0; j < n; j += length) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < length; ++k) sum += values[j + k];
        partial[several ? (i + j) / group_elements : t] = sum;
      }
    } else if (sizeof(T) == sizeof(float) && a.pred_dtype == Dtype::bf16) {
      partial[t] = rows_tile<kind, T>(a, i, n, static_cast<const uint16_t*>(a.pred) + i, grad);
    } else {
      partial[t] = rows_tile<kind, T>(a, i, n, load(a.pred, a.pred_dtype, i, n, pred_buffer), grad);
    }
    out.finish();
  }
  const int64_t group_rows = a.rows / a.groups, parts = several ? 1 : group_tiles;
  for (int64_t g = 0; g < a.groups; ++g) {
    const double sum = sum_of_partials(partial + g * parts, parts);
    static_cast<T*>(a.loss)[g] = static_cast<T>(sum * static_cast<double>(coefficient_at<T>(a.scale, g * group_rows)));
  }
  return Status::ok;
}

template <typename T>
Status dispatch(const RegressionLossArguments& a) {
  switch (a.kind) {
    case Penalty::squared:
      return loss_as<Penalty::squared, T>(a);
    case Penalty::huber:
      return loss_as<Penalty::huber, T>(a);
    case Penalty::pseudo_huber:
      return loss_as<Penalty::pseudo_huber, T>(a);
    case Penalty::l1:
      return loss_as<Penalty::l1, T>(a);
  }
  return Status::bad_argument;
}

}  // namespace

Status regression_loss(const RegressionLossArguments& a) {
  return a.pred_dtype == Dtype::f64 || a.dtype == Dtype::f64 ? dispatch<double>(a) : dispatch<float>(a);
}

}  // namespace FM_ISA
}  // namespace fm

FM_ENTRY_POINTS(regression_loss, fm::RegressionLossArguments)
