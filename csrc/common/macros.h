// Marks shared by the host compilers and nvcc: every formula is written once and compiled for both.
#pragma once

#if defined(__CUDACC__)
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FM_HOST_DEVICE __forceinline
#else
#define FM_HOST_DEVICE inline __attribute__((always_inline))
#endif
