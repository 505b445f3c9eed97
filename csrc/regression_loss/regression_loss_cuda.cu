#include "../common/reduce.cuh"
#include "regression_loss.h"
#include "regression_loss_body.cuh"

namespace fm {
namespace {

// Blocks kept resident on a multiprocessor: as many as leave the registers to spill nothing on any
// architecture.
template <typename Shape>
constexpr int resident_blocks = 3;
template <Dtype pred_dtype, Dtype dtype, int U>
constexpr int resident_blocks<LossShape<pred_dtype, dtype, U, true>> = 2;
template <int U>
constexpr int resident_blocks<LossShape<Dtype::f64, Dtype::f64, U, false>> = 2;
template <>
constexpr int resident_blocks<LossShape<Dtype::bf16, Dtype::bf16, 1, false>> = 4;

template <typename Shape>
__global__ void __launch_bounds__(block_threads, resident_blocks<Shape>)
    loss_kernel(const __grid_constant__ LossParams<typename Shape::A> p,
                const __grid_constant__ Finish<typename Shape::A> finish, double* workspace, int lanes) {
  using A = typename Shape::A;
  FM_DYNAMIC_SHARED(table);
  A* values = p.partition.block_groups > 0 ? reinterpret_cast<A*>(table) : nullptr;
  const Tally<A> tally = loss_thread<Shape>(p, blockIdx.x, threadIdx.x, values);
  finish_block(p.partition, finish, workspace, lanes, tally);
}

struct Launch {
  const RegressionLossArguments& a;
  cudaStream_t stream;

  template <typename Shape>
  Status operator()(Shape) const {
    using A = typename Shape::A;
    const LossParams<A> p = make_loss_params<Shape>(a);
    const Partition& partition = p.partition;
    if (partition.blocks > most_blocks) return Status::bad_argument;
    const Finish<A> finish = make_loss_finish<A>(a);
    double* workspace = static_cast<double*>(a.workspace);
    FM_LAUNCH(loss_kernel<Shape>, static_cast<unsigned>(partition.blocks), block_threads, shared_bytes<A>(partition),
              stream)
    (p, finish, workspace, small_group_lanes(partition.group_elements));
    return finish_parts(partition, finish, workspace, stream);
  }
};

}  // namespace

Status regression_loss_cuda(const RegressionLossArguments& a, void* stream) {
  if (a.count < 1 || a.count > max_loss_operands) return Status::bad_argument;
  if (a.rows * a.inner == 0) return Status::ok;
  return choose_loss_shape(a, Launch{a, static_cast<cudaStream_t>(stream)});
}

}  // namespace fm
