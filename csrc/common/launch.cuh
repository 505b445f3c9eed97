// What a kernel's file needs beyond C++: launches and shared memory. tests/cpp/simt defines the same for its emulator,
// with which these files are compiled as C++ and run without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#if !defined(FM_LAUNCH)
// Followed by the arguments.
#define FM_LAUNCH(kernel, grid, block, shared_bytes, stream) kernel<<<grid, block, shared_bytes, stream>>>
// A variable of a type, one for the block.
#define FM_SHARED(name, ...)       \
  using name##_type = __VA_ARGS__; \
  __shared__ name##_type name
// The memory that the launch gives the block.
#define FM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif
