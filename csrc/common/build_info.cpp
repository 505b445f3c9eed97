#include "build_info.h"

#include <sstream>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(FM_HAS_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace fm {

std::map<std::string, std::string> build_info() {
  return {{"version", FM_VERSION},
          {"compiler", FM_COMPILER},
          {"cuda_compiler", FM_CUDA_COMPILER},
          {"cpu_variants", FM_CPU_VARIANTS},
          {"openmp",
#if defined(_OPENMP)
           "yes"
#else
           "no"
#endif
          }};
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> architectures;
  std::istringstream list(FM_CUDA_ARCHITECTURES);
  for (std::string item; std::getline(list, item, ',');) architectures.push_back(item);
  return architectures;
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

std::string cuda_error_text(int code) {
#if defined(FM_HAS_CUDA)
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return "CUDA error " + std::to_string(code);
#endif
}

}  // namespace fm
