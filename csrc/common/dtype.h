// Element types of the ABI. The codes are those of fmkernels/_native.py.
#pragma once

#include "macros.h"

namespace fm {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

FM_HOST_DEVICE constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace fm
