// The penalty rho of a residual d = pred - target, and its derivative. The codes are those of
// fmkernels/ops/regression_loss/kinds.py, which has the formulas' sources.
#pragma once

#include <cfloat>
#include <cmath>

#include "../common/macros.h"

namespace fm {

enum class Penalty : int { squared = 0, huber = 1, pseudo_huber = 2, l1 = 3 };

// The bend of "huber" and "pseudo_huber" in the accumulation type, within its normal numbers.
template <typename T>
FM_HOST_DEVICE T bend(double delta) {
  constexpr double low = sizeof(T) == sizeof(float) ? FLT_MIN : DBL_MIN;
  constexpr double high = sizeof(T) == sizeof(float) ? FLT_MAX : DBL_MAX;
  return static_cast<T>(delta < low ? low : delta > high ? high : delta);
}

// Writes rho(d) and rho'(d). T is the accumulation type, float or double.
template <Penalty kind, typename T>
FM_HOST_DEVICE void penalty(T d, T delta, T& value, T& derivative) {
  if constexpr (kind == Penalty::squared) {
    value = d * d;
    derivative = d + d;
  } else if constexpr (kind == Penalty::huber) {
    const T magnitude = d < T(0) ? -d : d;
    const bool inside = magnitude <= delta;
    value = inside ? T(0.5) * d * d : delta * (magnitude - T(0.5) * delta);
    derivative = inside ? d : (d < T(0) ? -delta : (d > T(0) ? delta : d));  // a NaN stays one
  } else if constexpr (kind == Penalty::pseudo_huber) {
    // sqrt(d^2 + delta^2) - delta = d^2 / (sqrt(d^2 + delta^2) + delta), without the cancellation next to 0; d and
    // delta are measured by the larger of them, so that no square overflows, not both vanish and no infinity meets one
    const T magnitude = d < T(0) ? -d : d;
    const bool outside = magnitude > delta;  // a NaN is not, and stays one
    const T ratio = (outside ? delta : magnitude) / (outside ? magnitude : delta);
    const T size = outside ? T(1) : ratio, b = outside ? ratio : T(1);
    const T x = d < T(0) ? -size : size;
    const T root = sqrt(x * x + b * b);
    const T slope = x / (root * (root + b));
    value = d * (slope * root);
    derivative = slope * (root + b);
  } else {
    value = d < T(0) ? -d : d;
    derivative = d < T(0) ? T(-1) : (d > T(0) ? T(1) : d);  // 0 at 0, a NaN stays one
  }
}

}  // namespace fm
