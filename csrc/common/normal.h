// Uniforms and normals from Philox words. Branch-free, so that host compilers vectorise them and warps do not
// diverge.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fm {

FM_HOST_DEVICE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FM_HOST_DEVICE uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// a b + c, fused explicitly on the device: left to itself the compiler may fuse differently in every kernel,
// and noise that is drawn again must be bitwise what was drawn before.
FM_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

FM_HOST_DEVICE double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// A GPU's own functions, one instruction each; the same instruction gives the same bits in every kernel. The PTX ISA
// (9.1, sections 9.7.3.20 and 9.7.3.15) documents of log2 an absolute error of 2^-22 for x in (1/2, 2) and else a
// relative one of 2^-22, of the square root a relative one of 2^-23. The CUDA programming guide, from extensive tests,
// has 2 ulp of __log2f outside [1/2, 2], and 1 ulp of sqrtf with -prec-sqrt=false (5.2 on): the same instructions, and
// half to all of that error.
struct Hardware {
#if defined(__CUDA_ARCH__) && !defined(FM_EMULATED)
  FM_HOST_DEVICE static float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  FM_HOST_DEVICE static float square_root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#else
  FM_HOST_DEVICE static float log2(float x) { return std::log2(x); }
  FM_HOST_DEVICE static float square_root(float x) { return std::sqrt(x); }
#endif
};

// (0, 1]: the float32 nearest to (word + 1/2) / 2^32 where that is taken of the word rounded to float32.
// Every implementation and every dtype starts from this float32, which is why their normals agree.
FM_HOST_DEVICE float open_uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

// [0, 1): the word's top bits over 2^bits, with no more bits than the significand holds, so that 1 is never
// reached. bits: 24 for f32, 11 for f16, 8 for bf16; 32 for f64.
FM_HOST_DEVICE float half_open_uniform(uint32_t word, int bits) {
  return static_cast<float>(word >> (32 - bits)) * bits_to_float(static_cast<uint32_t>(127 - bits) << 23);
}

FM_HOST_DEVICE double half_open_uniform_double(uint32_t word) { return static_cast<double>(word) * 0x1p-32; }

// log(x) for normal positive x: x = m 2^e with m in [sqrt(1/2), sqrt(2)), then the polynomial of Cephes' logf
// in m - 1. Relative error below 2 ulp, also next to 1, where radii near 0 come from.
FM_HOST_DEVICE float log_positive(float x) {
  const uint32_t shifted = float_to_bits(x) - 0x3F3504F3u;  // exponent field counts from sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = bits_to_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = multiply_add(p, f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  const float f2 = f * f;
  const float tail = multiply_add(-0.5f, f2, multiply_add(p * f, f2, e * -2.12194440e-4f));
  return multiply_add(e, 0.693359375f, f + tail);
}

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]. The quarter turn is taken off exactly; polynomials on [-1/8,
// 1/8] turns.
FM_HOST_DEVICE void cos_sin_turns(float u, float& cosine, float& sine) {
  const float quarter = static_cast<float>(static_cast<int32_t>(u * 4.0f + 0.5f));
  const float r = (u - quarter * 0.25f) * 6.2831853072f;
  const float r2 = r * r;
  float s = -1.9515295891e-4f;
  s = multiply_add(s, r2, 8.3321608736e-3f);
  s = multiply_add(s, r2, -1.6666654611e-1f);
  s = multiply_add(s * r2, r, r);
  float c = 2.443315711809948e-5f;
  c = multiply_add(c, r2, -1.388731625493765e-3f);
  c = multiply_add(c, r2, 4.166664568298827e-2f);
  c = multiply_add(c * r2, r2, -0.5f * r2) + 1.0f;
  const uint32_t q = static_cast<uint32_t>(static_cast<int32_t>(quarter));
  const bool swap = (q & 1u) != 0;
  const uint32_t cos_sign = ((q + 1u) & 2u) << 30, sin_sign = (q & 2u) << 30;
  cosine = bits_to_float(float_to_bits(swap ? s : c) ^ cos_sign);
  sine = bits_to_float(float_to_bits(swap ? c : s) ^ sin_sign);
}

// Box-Muller on a GPU: r cos(2 pi v) and r sin(2 pi v), r = sqrt(-2 log u), for u and v in [2^-33, 1], with the
// hardware's logarithm and root.
//
// Next to u = 1, where the logarithm's error does not shrink with its value, a series in 1 - u (exact there) takes its
// place, selected without a branch; its own error in r is 3e-8. By the guide's bounds r is wrong by 7e-7 at most just
// before the series (2 ln 2 2^-22 over twice an r of 1/4) and, at the largest r, 6.76, by 1.3e-6: 0.5e-6 of it the
// root's ulp; by the PTX ISA's alone by 1.8e-6 there. Half turns of the angle are taken off exactly, by an addition
// that rounds to whole numbers, and go into the radius' sign; then polynomials on [-1/4, 1/4] turns, which are off
// by 1.4e-7 with their roundings. The hardware's sine and cosine may be off by 4e-7 and would be too coarse for large
// r.
template <typename Functions>
FM_HOST_DEVICE void approximate_normals(float u, float v, float& z0, float& z1) {
  const float t = 1.0f - u;
  const float near = t * multiply_add(t, multiply_add(t, 6.9064641e-1f, 9.99737978e-1f), 2.0f);
  const float far = Functions::log2(u) * -1.3862943611f;
  const float radius = Functions::square_root(t < 0x1p-5f ? near : far);
  const float shifted = multiply_add(v, 2.0f, 0x1.8p23f);
  const float x = multiply_add(shifted - 0x1.8p23f, -0.5f, v);
  const float x2 = x * x;
  float s = multiply_add(3.994229507e1f, x2, -7.660961151e1f);
  s = multiply_add(s, x2, 8.160400391e1f);
  s = multiply_add(s, x2, -4.134171295e1f);
  s = multiply_add(s, x2, 6.2831853072f) * x;
  float c = multiply_add(-2.500679588e1f, x2, 6.01482048e1f);
  c = multiply_add(c, x2, -8.54538269e1f);
  c = multiply_add(c, x2, 6.493935394e1f);
  c = multiply_add(c, x2, -1.973920822e1f);
  c = multiply_add(c, x2, 1.0f);
  const float r = bits_to_float(float_to_bits(radius) + (float_to_bits(shifted) << 31));
  z0 = r * c;
  z1 = r * s;
}

// Box-Muller: two words, two independent standard normals, z0 = r cos(2 pi u2), z1 = r sin(2 pi u2), |z|
// <= 6.77. Float normals of a GPU and of the CPU differ by 2e-6 at most, by the PTX ISA's bounds alone by 2.5e-6.
FM_HOST_DEVICE void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
#if defined(__CUDA_ARCH__)
  approximate_normals<Hardware>(open_uniform(a), open_uniform(b), z0, z1);
#else
  const float radius = std::sqrt(-2.0f * log_positive(open_uniform(a)));
  float cosine, sine;
  cos_sin_turns(open_uniform(b), cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
#endif
}

FM_HOST_DEVICE void box_muller(uint32_t a, uint32_t b, double& z0, double& z1) {
  const double radius = sqrt(-2.0 * log(static_cast<double>(open_uniform(a))));
#if defined(__CUDA_ARCH__)
  double cosine, sine;  // in half turns: needs no reduction of the angle, and so no local memory
  sincospi(2.0 * static_cast<double>(open_uniform(b)), &sine, &cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
#else
  const double angle = 6.283185307179586 * static_cast<double>(open_uniform(b));
  z0 = radius * cos(angle);
  z1 = radius * sin(angle);
#endif
}

}  // namespace fm
