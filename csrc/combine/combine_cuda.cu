#include "../common/reduce.cuh"
#include "combine.h"
#include "combine_body.cuh"

namespace fm {
namespace {

// Blocks kept resident on a multiprocessor: as many as leave the registers to spill nothing on any
// architecture.
template <typename Shape>
constexpr int resident_blocks = Shape::norm || Shape::dtype == Dtype::f64 || (Shape::noise && Shape::V == 8) ? 2
                                : Shape::noise || Shape::dtype == Dtype::f16                                 ? 3
                                                                                                             : 4;

template <typename Shape>
__global__ void __launch_bounds__(block_threads, resident_blocks<Shape>)
    combine_kernel(const __grid_constant__ CombineParams<typename Shape::A> p, int64_t tiles) {
  if constexpr (Shape::chunk == 1 && !Shape::noise) {
    // One coefficient for all, and it is 1: the backward pass of a loss whose gradient needs no factor.
    const auto& coefficient = p.operands[0].coefficient;
    if (p.skip_ones && (coefficient.data == nullptr || coefficient.stride == 0) && coefficient.at(0) == 1) return;
  }
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) combine_thread<Shape>(p, tile, threadIdx.x, nullptr);
}

template <typename Shape>
__global__ void __launch_bounds__(block_threads, resident_blocks<Shape>)
    combine_norm_kernel(const __grid_constant__ CombineParams<typename Shape::A> p,
                        const __grid_constant__ Finish<typename Shape::A> finish, double* workspace, int lanes) {
  using A = typename Shape::A;
  FM_DYNAMIC_SHARED(table);
  A* values = p.partition.block_groups > 0 ? reinterpret_cast<A*>(table) : nullptr;
  const Tally<A> tally = combine_thread<Shape>(p, blockIdx.x, threadIdx.x, values);
  finish_block(p.partition, finish, workspace, lanes, tally);
}

// Blocks of a call that may have nothing to do: enough to fill any GPU, few enough to leave at once.
constexpr int64_t skip_blocks = 2048;

struct Launch {
  const CombineArguments& a;
  cudaStream_t stream;

  template <typename Shape>
  Status operator()(Shape) const {
    using A = typename Shape::A;
    CombineParams<A> p = make_combine_params<A>(a);
    if constexpr (Shape::norm) {
      const Partition& partition = p.partition;
      if (partition.blocks > most_blocks) return Status::bad_argument;
      const Finish<A> finish = make_norm_finish<A>(a);
      double* workspace = static_cast<double*>(a.workspace);
      FM_LAUNCH(combine_norm_kernel<Shape>, static_cast<unsigned>(partition.blocks), block_threads,
                shared_bytes<A>(partition), stream)
      (p, finish, workspace, small_group_lanes(partition.group_elements));
      return finish_parts(partition, finish, workspace, stream);
    } else {
      const int64_t tiles = make_tiles<Shape>(a, p);
      const int64_t blocks = p.skip_ones && tiles > skip_blocks ? skip_blocks : tiles;
      if (blocks > most_blocks) return Status::bad_argument;
      FM_LAUNCH(combine_kernel<Shape>, static_cast<unsigned>(blocks), block_threads, 0, stream)(p, tiles);
      return launch_status();
    }
  }
};

}  // namespace

Status combine_cuda(const CombineArguments& a, void* stream) {
  if (a.count < 1 || a.count > max_operands) return Status::bad_argument;
  if (a.rows * a.inner == 0) return Status::ok;
  return choose_combine_shape(a, Launch{a, static_cast<cudaStream_t>(stream)});
}

}  // namespace fm
