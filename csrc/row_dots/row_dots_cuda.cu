#include "../common/reduce.cuh"
#include "row_dots.h"
#include "row_dots_body.cuh"

namespace fm {
namespace {

// Blocks kept resident on a multiprocessor: as many as leave the registers to spill nothing on any architecture.
template <typename Shape>
constexpr int resident_blocks = Shape::N <= 2 ? 4 : 2;

constexpr int block_warps = block_threads / 32;

// A block's share of a row: the sums of its threads, in a fixed order.
template <typename Shape>
__global__ void __launch_bounds__(block_threads, resident_blocks<Shape>)
    row_dots_kernel(const __grid_constant__ RowDotsParams<typename Shape::A> p) {
  FM_SHARED(warps, double[Shape::products][block_warps]);
  const RowDotsBody<Shape> body = row_dots_thread<Shape>(p, blockIdx.x, threadIdx.x);
#pragma unroll
  for (int c = 0; c < Shape::products; ++c) {
    if ((p.wanted >> c & 1u) == 0) continue;
    typename Shape::A sum = body.sums[c];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(whole_warp, sum, offset);
    if (threadIdx.x % 32 == 0) warps[c][threadIdx.x / 32] = static_cast<double>(sum);
  }
  __syncthreads();
  const int pair = static_cast<int>(threadIdx.x);
  if (pair >= p.pairs) return;
  const int product = p.product[pair];
  double sum = 0;
  if (product >= 0) {
#pragma unroll
    for (int w = 0; w < block_warps; ++w) sum += warps[product][w];
  } else {
    int64_t begin, end;
    p.partition.range(blockIdx.x, begin, end);
    sum = static_cast<double>(end - begin);
  }
  if (p.partition.parts == 1)
    p.out[static_cast<int64_t>(blockIdx.x) * p.pairs + pair] = static_cast<typename Shape::A>(sum);
  else
    p.workspace[pair * p.partition.blocks + blockIdx.x] = sum;
}

// Rows short enough for the lanes of a warp.
template <typename Shape>
__global__ void __launch_bounds__(block_threads, resident_blocks<Shape>)
    short_row_dots_kernel(const __grid_constant__ RowDotsParams<typename Shape::A> p) {
  using A = typename Shape::A;
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (block_threads / p.lanes) + threadIdx.x / p.lanes;
  const RowDotsBody<Shape> body = row_dots_lane<Shape>(p, row, lane);
  const bool writes = lane == 0 && row < p.rows;
  A* out = p.out + row * p.pairs;
#pragma unroll
  for (int c = 0; c < Shape::products; ++c) {
    if ((p.wanted >> c & 1u) == 0) continue;
    A sum = body.sums[c];
    for (int offset = p.lanes / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(whole_warp, sum, offset);
#pragma unroll 1
    for (int pair = 0; pair < p.pairs; ++pair)
      if (writes && p.product[pair] == c) out[pair] = sum;
  }
#pragma unroll 1
  for (int pair = 0; pair < p.pairs; ++pair)
    if (writes && p.product[pair] < 0) out[pair] = static_cast<A>(p.inner);
}

// A block a row and pair: adds what the blocks of the row have left.
template <typename A>
__global__ void row_dots_finish_kernel(A* out, const double* workspace, int64_t parts, int64_t rows, int pairs) {
  const int64_t row = blockIdx.x, pair = blockIdx.y;
  const double* partial = workspace + (pair * rows + row) * parts;
  double sum = 0;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < parts; j += blockDim.x) sum += partial[j];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[row * pairs + pair] = static_cast<A>(sum);
}

struct Launch {
  const RowDotsArguments& a;
  cudaStream_t stream;

  template <typename Shape>
  Status operator()(Shape) const {
    using A = typename Shape::A;
    const RowDotsParams<A> p = make_row_dots_params<Shape>(a);
    if (p.lanes > 0) {
      const int64_t block_rows = block_threads / p.lanes, blocks = (a.rows + block_rows - 1) / block_rows;
      if (blocks > most_blocks) return Status::bad_argument;
      FM_LAUNCH(short_row_dots_kernel<Shape>, static_cast<unsigned>(blocks), block_threads, 0, stream)(p);
      return launch_status();
    }
    const Partition& partition = p.partition;
    if (partition.blocks > most_blocks) return Status::bad_argument;
    FM_LAUNCH(row_dots_kernel<Shape>, static_cast<unsigned>(partition.blocks), block_threads, 0, stream)(p);
    const Status status = launch_status();
    if (status != Status::ok || partition.parts == 1) return status;
    const int threads = partition.parts <= 128 ? 32 : partition.parts <= 2048 ? 256 : 1024;
    const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>(a.pairs));
    FM_LAUNCH(row_dots_finish_kernel<A>, grid, threads, 0, stream)(p.out, p.workspace, partition.parts, a.rows,
                                                                   a.pairs);
    return launch_status();
  }
};

}  // namespace

Status row_dots_cuda(const RowDotsArguments& a, void* stream) {
  if (!valid(a)) return Status::bad_argument;
  if (a.rows * a.inner == 0) return Status::ok;
  return choose_row_dots_shape(a, Launch{a, static_cast<cudaStream_t>(stream)});
}

}  // namespace fm
