#include "build_info.h"

#include <sstream>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(FM_HAS_CUDA)
#include <cuda_runtime_api.h>
#else
#include "../combine/combine.h"
#include "../random/random.h"
#include "../regression_loss/regression_loss.h"
#include "../row_dots/row_dots.h"
#include "../step_control/step_control.h"
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

#if !defined(FM_HAS_CUDA)
Status combine_cuda(const CombineArguments&, void*) { return Status::no_cuda; }
Status regression_loss_cuda(const RegressionLossArguments&, void*) { return Status::no_cuda; }
Status random_cuda(const RandomArguments&, void*) { return Status::no_cuda; }
Status row_dots_cuda(const RowDotsArguments&, void*) { return Status::no_cuda; }
Status step_control_cuda(const StepControlArguments&, void*) { return Status::no_cuda; }
Status step_trial_cuda(const StepControlArguments&, void*) { return Status::no_cuda; }
Status step_rows_cuda(const StepRowsArguments&, void*) { return Status::no_cuda; }
int64_t workspace_elements_cuda(int64_t, int64_t) { return 0; }
#endif

}  // namespace fm
