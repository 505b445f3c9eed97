// bfloat16 and float16 to and from float, round to nearest even, NaN kept. Branch-free, for host compilers
// without instructions of their own.
#pragma once

#include <cstdint>

#include "normal.h"

namespace fm {

FM_HOST_DEVICE float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

FM_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

FM_HOST_DEVICE float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu);
  // Exponents move from bias 15 to 127 by a multiplication, which also makes subnormals normal.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7F800000u | (magnitude << 13);
  const uint32_t bits = magnitude >= 0x7C00u ? special : float_to_bits(scaled);
  return bits_to_float(bits | sign);
}

FM_HOST_DEVICE uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 halves are subnormal: adding 1/2 as a float leaves their 10 bits, rounded, at the
  // significand's end.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | sign);
}

}  // namespace fm
