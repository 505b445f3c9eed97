// What every entry point of the library returns.
#pragma once

namespace fm {

enum class Status : int {
  ok = 0,
  bad_argument = 1,   // a dtype, kind or size that the library does not know; the Python layer checks before it calls
  no_cuda = 2,        // built without CUDA
  cuda_error = 1000,  // plus the cudaError_t
};

}  // namespace fm
