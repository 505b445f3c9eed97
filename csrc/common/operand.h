// What the linear kernels read: operands (tensors, or noise drawn where it is used) with a coefficient each.
//
// All tensors of a call are dense, in one order of elements: `rows` rows of `inner` elements. A row is the
// finest part of the data over which every coefficient is one number.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "macros.h"

namespace fm {

// value + slope * entry, entry row / rows_per_entry lying `stride` elements apart; `value` alone where data is null.
// Entries are float, or double where the call accumulates in double.
struct Coefficient {
  const void* data;
  int64_t rows_per_entry;
  int64_t stride;
  double value;
  double slope = 1.0;
};

template <typename T>
FM_HOST_DEVICE T coefficient_at(const Coefficient& c, int64_t row) {
  const T value = static_cast<T>(c.value);
  return c.data == nullptr
             ? value
             : value + static_cast<T>(c.slope) * static_cast<const T*>(c.data)[row / c.rows_per_entry * c.stride];
}

struct Operand {
  const void* data;     // a tensor of the call's data dtype; or null: standard normal noise, element i of which is
  const int64_t* seed;  // number offset + i of `stream` under *seed, rounded to the data dtype
  int64_t stream;
  int64_t offset;
  void* store;  // where drawn noise is also written (data dtype), or null
  Coefficient coefficient;
  Coefficient error;  // coefficient of the error combination (combine only)
};

constexpr int max_operands = 17;  // 16 tensors and one noise term

}  // namespace fm
