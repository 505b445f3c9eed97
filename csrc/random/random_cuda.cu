#include "../common/reduce.cuh"
#include "random.h"
#include "random_body.cuh"

namespace fm {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(block_threads) random_kernel(const __grid_constant__ RandomParams p) {
  random_thread<Shape>(p, blockIdx.x, threadIdx.x);
}

struct Launch {
  const RandomArguments& a;
  cudaStream_t stream;

  template <typename Shape>
  Status operator()(Shape) const {
    const int64_t blocks = (a.count + Shape::tile - 1) / Shape::tile;
    if (blocks > most_blocks) return Status::bad_argument;
    FM_LAUNCH(random_kernel<Shape>, static_cast<unsigned>(blocks), block_threads, 0, stream)(make_random_params(a));
    return launch_status();
  }
};

}  // namespace

Status random_cuda(const RandomArguments& a, void* stream) {
  if (a.count == 0) return Status::ok;
  return choose_random_shape(a, Launch{a, static_cast<cudaStream_t>(stream)});
}

}  // namespace fm
