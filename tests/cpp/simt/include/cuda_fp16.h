// float16 as the hardware rounds it, for the emulator: a NaN becomes 0x7FFF. The conversions are the library's own for
// hosts, which tests/cpp/test_common.cpp compares with exact arithmetic.
#pragma once

#include <cstdint>

#include "common/float16.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
} __attribute__((aligned(4)));

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7FFF};
  return {fm::float_to_f16(value)};
}
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half value) { return fm::f16_to_float(value.bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
