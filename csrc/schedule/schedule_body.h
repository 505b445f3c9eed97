// What is done for one time; see schedule/schedule.h.
#pragma once

#include <cmath>

#include "../common/macros.h"
#include "../common/normal.h"
#include "../common/philox.h"
#include "schedule.h"

namespace fm {

constexpr double half_pi = 1.57079632679489661923;

// Below this a standard deviation that is divided by counts as this: SMALL of fmkernels/paths/derivatives.py.
constexpr double small_sigma = 1e-4;

// sin(pi t / 2). CUDA's sin would keep local memory for arguments that never come.
FM_HOST_DEVICE float sin_half_pi(float t) {
#if defined(__CUDA_ARCH__) && !defined(FM_EMULATED)
  return sinpif(0.5f * t);
#else
  return std::sin(static_cast<float>(half_pi) * t);
#endif
}
FM_HOST_DEVICE double sin_half_pi(double t) {
#if defined(__CUDA_ARCH__) && !defined(FM_EMULATED)
  return sinpi(0.5 * t);
#else
  return std::sin(half_pi * t);
#endif
}

template <typename T>
FM_HOST_DEVICE T divisible(T sigma) {
  return sigma < static_cast<T>(small_sigma) ? static_cast<T>(small_sigma) : sigma;  // a NaN stays one
}

// y: alpha, sigma, d alpha / dt, d sigma / dt.
template <typename T>
FM_HOST_DEVICE void schedule_at(ScheduleKind kind, T a, T b, T t, T (&y)[4]) {
  using std::exp;
  using std::expm1;
  using std::log;
  using std::pow;
  using std::sqrt;
  const T s = T(1) - t;
  switch (kind) {
    case ScheduleKind::vp: {
      const T slope = b - a, total = s * (T(0.5) * slope * s + a), rate = -(slope * s + a);
      y[0] = exp(T(-0.5) * total);
      y[1] = sqrt(-expm1(-total));
      y[2] = T(-0.5) * rate * y[0];
      y[3] = T(0.5) * rate * (y[0] * y[0]) / divisible(y[1]);
      break;
    }
    case ScheduleKind::cosine:
      y[0] = sin_half_pi(t);
      y[1] = sin_half_pi(s);
      y[2] = static_cast<T>(half_pi) * y[1];
      y[3] = static_cast<T>(-half_pi) * y[0];
      break;
    case ScheduleKind::linear_vp:
      y[0] = t;
      y[1] = sqrt(s * (T(1) + t));
      y[2] = T(1);
      y[3] = -t / divisible(y[1]);
      break;
    case ScheduleKind::polynomial:
      y[0] = pow(t, a);
      y[1] = t > T(0.5) ? -expm1(a * log(t)) : T(1) - y[0];
      y[2] = a * pow(t, a - T(1));
      y[3] = -y[2];
      break;
    case ScheduleKind::ve:
      y[0] = T(1);
      y[1] = a * exp(b * s);
      y[2] = T(0);
      y[3] = -b * y[1];
      break;
    case ScheduleKind::optimal_transport:
      y[0] = t;
      y[1] = s + a * t;
      y[2] = T(1);
      y[3] = a - T(1);
      break;
  }
}

FM_HOST_DEVICE float drawn_time(const ScheduleArguments& a, int64_t i) {
  const int64_t index = a.offset + i;
  const Words w =
      philox4x32(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(index / 4), static_cast<uint64_t>(a.stream));
  const int64_t place = index % 4;
  return half_open_uniform(place == 0 ? w.w0 : place == 1 ? w.w1 : place == 2 ? w.w2 : w.w3, 24);
}

template <typename T>
FM_HOST_DEVICE void schedule_thread(const ScheduleArguments& a, int64_t i) {
  T* t = static_cast<T*>(a.t) + i;
  if (a.seed != nullptr) *t = static_cast<T>(drawn_time(a, i));
  T y[4];
  schedule_at(a.kind, static_cast<T>(a.a), static_cast<T>(a.b), *t, y);
  T* out = static_cast<T*>(a.out) + i;
  for (int k = 0; k < 4; ++k) out[k * a.count] = y[k];
}

FM_HOST_DEVICE bool valid(const ScheduleArguments& a) {
  return (a.dtype == Dtype::f32 || a.dtype == Dtype::f64) && static_cast<int>(a.kind) >= 0 &&
         static_cast<int>(a.kind) <= static_cast<int>(ScheduleKind::optimal_transport) && a.count >= 0;
}

}  // namespace fm
