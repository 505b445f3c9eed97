// The few names of CUDA's runtime that the kernels' files use, for the emulator.
#pragma once

using cudaError_t = int;
using cudaStream_t = struct SimtStream*;
constexpr cudaError_t cudaSuccess = 0;

namespace simt {
extern cudaError_t last_error;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == 9 ? "invalid configuration argument" : "emulated error";
}
