#include "../common/reduce.cuh"
#include "step_control.h"
#include "step_rows_body.cuh"

namespace fm {
namespace {

constexpr int control_threads = 128;

template <bool trial>
__global__ void __launch_bounds__(control_threads) step_control_kernel(const __grid_constant__ StepControlArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * control_threads + threadIdx.x;
  if (row >= a.rows) return;
  if constexpr (trial)
    trial_thread(a, row);
  else
    control_thread(a, row);
}

template <bool trial>
Status launch_control(const StepControlArguments& a, void* stream) {
  const int64_t blocks = (a.rows + control_threads - 1) / control_threads;
  if (a.stages > max_stages || blocks > most_blocks) return Status::bad_argument;
  if (a.rows == 0) return Status::ok;
  FM_LAUNCH(step_control_kernel<trial>, static_cast<unsigned>(blocks), control_threads, 0,
            static_cast<cudaStream_t>(stream))
  (a);
  return launch_status();
}

template <typename Shape>
__global__ void __launch_bounds__(block_threads, 3)
    step_rows_kernel(const __grid_constant__ StepRowsParams<typename Shape::A> p) {
  using A = typename Shape::A;
  FM_SHARED(weights, A[max_stages]);
  const int64_t begin = blockIdx.x * Shape::tile, i = begin + static_cast<int64_t>(threadIdx.x) * Shape::V;
  const int64_t last = begin + Shape::tile < p.elements ? begin + Shape::tile - 1 : p.elements - 1;
  const int64_t first_row = p.by_inner.divide(begin);
  using Output = StepRowsShape<Shape::dtype, Shape::whole ? Shape::V : 1>;
  // the first of a thread's outputs, and how far apart they are
  const int64_t from = Shape::whole ? i : begin + threadIdx.x, step = Shape::whole ? Shape::tile : block_threads;
  if (first_row == p.by_inner.divide(last)) {  // one row: its weights are formed once
    const StepRowsBody<A> body(p, first_row);
    for (int32_t j = body.first; j < body.next; ++j) {
      __syncthreads();
      if (threadIdx.x < p.a.stages) weights[threadIdx.x] = body.weight(j, static_cast<int>(threadIdx.x));
      __syncthreads();
      for (int64_t e = from; e <= last; e += step) body.template output<Output>(e, j, weights);
    }
    if constexpr (Shape::whole) {
      if (i <= last) body.template move<Shape>(i);
    }
  } else {
    for (int64_t e = from; e <= last; e += step) {
      const StepRowsBody<A> body(p, p.by_inner.divide(e));
      for (int32_t j = body.first; j < body.next; ++j) body.template output<Output>(e, j, nullptr);
      if constexpr (Shape::whole) body.template move<Shape>(e);
    }
  }
  if constexpr (!Shape::whole) {
    __syncthreads();  // what one thread moves another one may have read
    if (i <= last) move_run<Shape>(p, i, last);
  }
}

struct Launch {
  const StepRowsArguments& a;
  cudaStream_t stream;

  template <typename Shape>
  Status operator()(Shape) const {
    const auto p = make_step_rows_params<typename Shape::A>(a);
    const int64_t blocks = (p.elements + Shape::tile - 1) / Shape::tile;
    if (blocks > most_blocks) return Status::bad_argument;
    FM_LAUNCH(step_rows_kernel<Shape>, static_cast<unsigned>(blocks), block_threads, 0, stream)(p);
    return launch_status();
  }
};

}  // namespace

Status step_control_cuda(const StepControlArguments& a, void* stream) { return launch_control<false>(a, stream); }
Status step_trial_cuda(const StepControlArguments& a, void* stream) { return launch_control<true>(a, stream); }

Status step_rows_cuda(const StepRowsArguments& a, void* stream) {
  if (a.stages > max_stages || a.degree > max_degree) return Status::bad_argument;
  if (a.rows * a.inner == 0) return Status::ok;
  return choose_step_rows_shape(a, Launch{a, static_cast<cudaStream_t>(stream)});
}

}  // namespace fm
