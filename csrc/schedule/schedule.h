// alpha, sigma and their derivatives of a built-in path at many times, in one launch; the times may be drawn in it.
//
// The formulas' sources are in fmkernels/paths/affine.py, whose numbers these are to rounding, at both ends too.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/status.h"

namespace fm {

// The codes of fmkernels/paths/fused.py. Parameters a, b: the minimum and maximum of beta (vp); the exponent
// (polynomial); sigma at t = 1 and the logarithm of sigma's growth to t = 0 (ve); sigma at t = 1 (optimal_transport).
enum class ScheduleKind : int { vp = 0, cosine = 1, linear_vp = 2, polynomial = 3, ve = 4, optimal_transport = 5 };

struct ScheduleArguments {
  ScheduleKind kind;
  Dtype dtype;  // f32 or f64
  double a, b;
  int64_t count;
  void* t;              // [count]; written where there is a seed
  const int64_t* seed;  // null, or t[i] is uniform number offset + i of `stream` in float, as random.h has it
  int64_t stream, offset;
  void* out;  // [4][count]: alpha, sigma, d alpha / dt, d sigma / dt
};

Status schedule_cpu(const ScheduleArguments& arguments);
Status schedule_cuda(const ScheduleArguments& arguments, void* stream);

}  // namespace fm
