// The error norm's term for one element, the same on the CPU and on a GPU.
#pragma once

#include <cmath>

#include "../common/macros.h"
#include "../common/normal.h"

namespace fm {

FM_HOST_DEVICE float absolute(float x) { return fabsf(x); }
FM_HOST_DEVICE double absolute(double x) { return fabs(x); }

// (error / (atol + rtol max(|first|, |y|)))^2
template <typename A>
FM_HOST_DEVICE A error_square(A error, A first, A y, A atol, A rtol) {
  const A k = absolute(first), magnitude = absolute(y);
  const A larger = k > magnitude || k != k ? k : magnitude;  // a NaN in either is kept
  const A ratio = error / multiply_add(rtol, larger, atol);
  return ratio * ratio;
}

}  // namespace fm
