#include "../common/reduce.cuh"
#include "schedule_body.h"

namespace fm {
namespace {

constexpr int schedule_threads = 128;  // times are few: small blocks reach more multiprocessors

template <typename T>
__global__ void __launch_bounds__(schedule_threads) schedule_kernel(const __grid_constant__ ScheduleArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * schedule_threads + threadIdx.x;
  if (i < a.count) schedule_thread<T>(a, i);
}

template <typename T>
Status launch_schedule(const ScheduleArguments& a, void* stream) {
  const int64_t blocks = (a.count + schedule_threads - 1) / schedule_threads;
  if (blocks > most_blocks) return Status::bad_argument;
  FM_LAUNCH(schedule_kernel<T>, static_cast<unsigned>(blocks), schedule_threads, 0, static_cast<cudaStream_t>(stream))
  (a);
  return launch_status();
}

}  // namespace

Status schedule_cuda(const ScheduleArguments& a, void* stream) {
  if (!valid(a)) return Status::bad_argument;
  if (a.count == 0) return Status::ok;
  return a.dtype == Dtype::f64 ? launch_schedule<double>(a, stream) : launch_schedule<float>(a, stream);
}

}  // namespace fm
