// Reductions of a block and of the parts of a group, in a fixed order. Device only.
#pragma once

#include "launch.cuh"
#include "range.cuh"
#include "status.h"

namespace fm {

constexpr unsigned whole_warp = 0xFFFFFFFFu;

// The sum over a block, in thread 0. Warps add in the accumulation type, the block in double.
template <typename A>
__device__ __forceinline__ double block_sum(A value) {
  FM_SHARED(warps, double[32]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(whole_warp, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = static_cast<double>(value);
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < (blockDim.x + 31) / 32; ++w) sum += warps[w];
  }
  return sum;
}

// Ends a block of a reduction: its groups' results where it has them whole, else its partial sum.
template <typename A>
__device__ __forceinline__ void finish_block(const Partition& p, const Finish<A>& finish, double* workspace, int lanes,
                                             const Tally<A>& tally) {
  if (p.block_groups == 0) {
    const double sum = block_sum(tally.sum);
    if (threadIdx.x != 0) return;
    if (p.parts == 1)
      finish(blockIdx.x, sum);
    else
      workspace[blockIdx.x] = sum;
    return;
  }
  __syncthreads();  // the table of values is complete
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.block_groups;
  const int64_t groups = min(p.block_groups, p.groups - first);
  // Every thread makes every round: the shuffles need whole warps.
  for (int64_t start = 0; start < groups; start += block_threads / lanes) {
    const int64_t group = start + static_cast<int>(threadIdx.x) / lanes;
    A sum = group < groups ? lane_sum(tally.values + group * p.group_elements, p.group_elements, lane, lanes) : A(0);
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(whole_warp, sum, offset);
    if (lane == 0 && group < groups) finish(first + group, static_cast<double>(sum));
  }
}

// A block a group: adds the partial sums that another launch has left.
template <typename A>
__global__ void finish_kernel(const __grid_constant__ Finish<A> finish, const double* workspace, int64_t parts) {
  const double* partial = workspace + static_cast<int64_t>(blockIdx.x) * parts;
  double sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < parts; j += blockDim.x) sum += partial[j];
  sum = block_sum(sum);
  if (threadIdx.x == 0) finish(blockIdx.x, sum);
}

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status::ok
                              : static_cast<Status>(static_cast<int>(Status::cuda_error) + static_cast<int>(error));
}

constexpr int64_t most_blocks = 2147483647;

// Values of the groups that share a block.
template <typename A>
size_t shared_bytes(const Partition& p) {
  return p.block_groups > 0 ? static_cast<size_t>(p.block_groups * p.group_elements) * sizeof(A) : 0;
}

// The last step after a launch over a partition.
template <typename A>
Status finish_parts(const Partition& p, const Finish<A>& finish, const double* workspace, cudaStream_t stream) {
  const Status status = launch_status();
  if (status != Status::ok || p.parts == 1) return status;
  const int threads = p.parts <= 128 ? 32 : p.parts <= 2048 ? 256 : 1024;
  FM_LAUNCH(finish_kernel<A>, static_cast<unsigned>(p.groups), threads, 0, stream)(finish, workspace, p.parts);
  return launch_status();
}

}  // namespace fm
