// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the one source of
// randomness.
//
// The key is the 64-bit seed; the counter is (block, stream): a block is four consecutive elements, so
// element i of a stream is word i % 4 of block i / 4. 2^64 blocks and 2^64 streams never meet: equal words
// need equal counters.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fm {

struct Words {
  uint32_t w0, w1, w2, w3;
};

FM_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && !defined(FM_EMULATED)
  uint64_t product;  // said so, because nvcc otherwise adds the 0 of the constant's upper half to every product
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// A round's key. Said so, because nvcc otherwise makes some from each other, some from the seed and most of them twice.
FM_HOST_DEVICE uint32_t round_key(uint32_t key, uint32_t raised) {
#if defined(__CUDA_ARCH__) && !defined(FM_EMULATED)
  uint32_t sum;
  asm("add.u32 %0, %1, %2;" : "=r"(sum) : "r"(key), "r"(raised));
  return sum;
#else
  return key + raised;
#endif
}

FM_HOST_DEVICE Words philox4x32(uint64_t seed, uint64_t block, uint64_t stream) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(c0, 0xD2511F53u);
    const uint64_t p1 = wide_product(c2, 0xCD9E8D57u);
    // From the seed and not from the last round's: a thread's blocks then share the keys.
    const uint32_t r = static_cast<uint32_t>(round);
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ round_key(k0, r * 0x9E3779B9u);
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ round_key(k1, r * 0xBB67AE85u);
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
  }
  return {c0, c1, c2, c3};
}

}  // namespace fm
