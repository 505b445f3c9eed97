// Vectors of consecutive elements, as a device thread owns them: wide loads and stores, and conversions.
//
// The .cuh headers hold everything that a thread does and compile for hosts too: the layout of workspaces is asked for
// there. Kernels are run whole without a GPU by tests/cpp/simt, with what stands under #if __CUDA_ARCH__.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "float16.h"
#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FM_UNROLL _Pragma("unroll")
#define FM_ROLLED _Pragma("unroll 1")
#else
#define FM_UNROLL
#define FM_ROLLED
#endif

namespace fm {

// 16 bytes, but four elements at least: a Philox block makes four.
FM_HOST_DEVICE constexpr int vector_length(Dtype dtype) { return bytes_of(dtype) == 2 ? 8 : 4; }

template <int bytes>
struct alignas(bytes < 16 ? bytes : 16) Packed {
  uint32_t words[bytes / 4];
};

// Reads that pass the caches by: every element is read once. Not the read-only path, because an output may be
// the very tensor that is read.
template <int bytes>
FM_HOST_DEVICE Packed<bytes> load_packed(const void* data, int64_t byte) {
  Packed<bytes> packed;
  const char* from = static_cast<const char*>(data) + byte;
#if defined(__CUDA_ARCH__)
  if constexpr (bytes == 4) {
    packed.words[0] = __ldcs(reinterpret_cast<const unsigned*>(from));
  } else if constexpr (bytes == 8) {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(from));
    packed.words[0] = v.x;
    packed.words[1] = v.y;
  } else {
    FM_UNROLL
    for (int q = 0; q < bytes / 16; ++q) {
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from) + q);
      packed.words[4 * q] = v.x;
      packed.words[4 * q + 1] = v.y;
      packed.words[4 * q + 2] = v.z;
      packed.words[4 * q + 3] = v.w;
    }
  }
#else
  std::memcpy(packed.words, from, bytes);
#endif
  return packed;
}

// `streaming`: past the caches, for outputs so large that nothing of them would still be there when they are
// read.
template <int bytes>
FM_HOST_DEVICE void store_packed(void* data, int64_t byte, const Packed<bytes>& packed, bool streaming) {
  char* to = static_cast<char*>(data) + byte;
#if defined(__CUDA_ARCH__)
  if constexpr (bytes == 8) {
    const uint2 v = make_uint2(packed.words[0], packed.words[1]);
    if (streaming)
      __stcs(reinterpret_cast<uint2*>(to), v);
    else
      *reinterpret_cast<uint2*>(to) = v;
  } else {
    FM_UNROLL
    for (int q = 0; q < bytes / 16; ++q) {
      const uint4 v =
          make_uint4(packed.words[4 * q], packed.words[4 * q + 1], packed.words[4 * q + 2], packed.words[4 * q + 3]);
      if (streaming)
        __stcs(reinterpret_cast<uint4*>(to) + q, v);
      else
        *(reinterpret_cast<uint4*>(to) + q) = v;
    }
  }
#else
  (void)streaming;
  std::memcpy(to, packed.words, bytes);
#endif
}

FM_HOST_DEVICE uint16_t narrow_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  return float_to_bf16(value);
#endif
}

FM_HOST_DEVICE uint16_t narrow_f16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  return float_to_f16(value);
#endif
}

FM_HOST_DEVICE float widen_f16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  return f16_to_float(bits);
#endif
}

template <Dtype dtype, int V, typename A>
FM_HOST_DEVICE void unpack(const Packed<V * bytes_of(dtype)>& packed, A (&out)[V]) {
  FM_UNROLL
  for (int j = 0; j < V; ++j) {
    if constexpr (dtype == Dtype::f64) {
      const uint64_t bits = static_cast<uint64_t>(packed.words[2 * j + 1]) << 32 | packed.words[2 * j];
#if defined(__CUDA_ARCH__)
      out[j] = __longlong_as_double(static_cast<long long>(bits));
#else
      std::memcpy(&out[j], &bits, sizeof bits);
#endif
    } else if constexpr (dtype == Dtype::f32) {
      out[j] = bits_to_float(packed.words[j]);
    } else {
      const uint16_t bits = static_cast<uint16_t>(packed.words[j / 2] >> (16 * (j % 2)));
      out[j] = dtype == Dtype::bf16 ? bf16_to_float(bits) : widen_f16(bits);
    }
  }
}

// Rounds to dtype.
template <Dtype dtype, int V, typename A>
FM_HOST_DEVICE Packed<V * bytes_of(dtype)> pack(const A (&in)[V]) {
  Packed<V * bytes_of(dtype)> packed;
  if constexpr (dtype == Dtype::f64) {
    FM_UNROLL
    for (int j = 0; j < V; ++j) {
      uint64_t bits;
#if defined(__CUDA_ARCH__)
      bits = static_cast<uint64_t>(__double_as_longlong(in[j]));
#else
      std::memcpy(&bits, &in[j], sizeof bits);
#endif
      packed.words[2 * j] = static_cast<uint32_t>(bits);
      packed.words[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
    }
  } else if constexpr (dtype == Dtype::f32) {
    FM_UNROLL
    for (int j = 0; j < V; ++j) packed.words[j] = float_to_bits(static_cast<float>(in[j]));
  } else {
    FM_UNROLL
    for (int j = 0; j < V / 2; ++j) {
      const float a = static_cast<float>(in[2 * j]), b = static_cast<float>(in[2 * j + 1]);
#if defined(__CUDA_ARCH__)
      // one instruction for the pair
      if constexpr (dtype == Dtype::bf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        packed.words[j] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(a, b);
        packed.words[j] = *reinterpret_cast<const uint32_t*>(&pair);
      }
#else
      const uint32_t low = dtype == Dtype::bf16 ? float_to_bf16(a) : float_to_f16(a);
      const uint32_t high = dtype == Dtype::bf16 ? float_to_bf16(b) : float_to_f16(b);
      packed.words[j] = low | high << 16;
#endif
    }
  }
  return packed;
}

// One element of a dtype known at run time: what is left over where vectors do not fit.
template <typename A>
FM_HOST_DEVICE A load_scalar(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<A>(static_cast<const float*>(data)[i]);
  if (dtype == Dtype::f64) return static_cast<A>(static_cast<const double*>(data)[i]);
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return static_cast<A>(dtype == Dtype::bf16 ? bf16_to_float(bits) : widen_f16(bits));
}

template <typename A>
FM_HOST_DEVICE void store_scalar(void* data, Dtype dtype, int64_t i, A value) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[i] = static_cast<float>(value);
  else if (dtype == Dtype::f64)
    static_cast<double*>(data)[i] = static_cast<double>(value);
  else
    static_cast<uint16_t*>(data)[i] =
        dtype == Dtype::bf16 ? narrow_bf16(static_cast<float>(value)) : narrow_f16(static_cast<float>(value));
}

template <typename A>
FM_HOST_DEVICE A round_scalar(Dtype dtype, A value) {
  if (dtype == Dtype::bf16) return static_cast<A>(bf16_to_float(narrow_bf16(static_cast<float>(value))));
  if (dtype == Dtype::f16) return static_cast<A>(widen_f16(narrow_f16(static_cast<float>(value))));
  return dtype == Dtype::f32 ? static_cast<A>(static_cast<float>(value)) : value;
}

// Floor division by a number that is known before the launch, for dividends in [0, 2^63): a multiplication
// and a shift (Granlund and Montgomery 1994) where the hardware's 64-bit division takes about 100
// instructions.
struct Divider {
  uint64_t magic;  // 0: the divisor is 1
  int shift;

  FM_HOST_DEVICE int64_t divide(int64_t dividend) const {
    if (magic == 0) return dividend;
    const uint64_t n = static_cast<uint64_t>(dividend);
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(n, magic);
#else
    const uint64_t n0 = n & 0xFFFFFFFFu, n1 = n >> 32, m0 = magic & 0xFFFFFFFFu, m1 = magic >> 32;
    const uint64_t middle = n1 * m0 + (n0 * m0 >> 32);
    const uint64_t high = n1 * m1 + (middle >> 32) + ((n0 * m1 + (middle & 0xFFFFFFFFu)) >> 32);
#endif
    return static_cast<int64_t>(high >> shift);
  }
};

// With 2^(s-1) < d <= 2^s the multiplier is floor(2^(63+s) / d) + 1, which fits into 64 bits; its error is at
// most d <= 2^s, and that is what makes the quotient exact for dividends below 2^63.
inline Divider make_divider(int64_t divisor) {
  if (divisor <= 1) return {0, 0};
  const uint64_t d = static_cast<uint64_t>(divisor);
  int s = 0;
  while (s < 63 && (uint64_t{1} << s) < d) ++s;
#if defined(__SIZEOF_INT128__)
  const uint64_t quotient = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + s)) / d);
#else
  uint64_t quotient = 0, rest = 1;
  for (int bit = 0; bit < 63 + s; ++bit) {
    rest <<= 1;
    quotient <<= 1;
    if (rest >= d) {
      rest -= d;
      ++quotient;
    }
  }
#endif
  return {quotient + 1, s - 1};
}

}  // namespace fm
