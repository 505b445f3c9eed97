// CUDA kernels on the CPU: the threads of a block are fibers, and every kernel runs whole, with its barriers, shuffles
// and shared memory. A .cu file is compiled as C++ with this header included first.
//
// What is checked: alignment of wide accesses, barriers that not all threads reach at one place, shuffles with lanes
// missing, deadlocks, launches that a GPU would refuse; shared memory that nobody has written is NaN. In a build with
// AddressSanitizer also bounds, in one with ThreadSanitizer races of the threads of a launch. What is not: the weak
// memory model, ptxas, the rounding of the hardware's approximations.
//
// Environment: SIMT_ORDER = forward (default), reverse or random is the order of blocks and threads; SIMT_REPORT names
// a file to which a process adds how often it launched which kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

struct Index {
  unsigned x, y, z;
};
struct Place {
  const char* file;
  int line;
};
extern Index thread_index, block_index;
extern dim3 block_size, grid_size;

// Of the running thread. They return when all threads of the block, or the lanes of the mask, have come.
void barrier(Place place);
uint64_t exchange(uint64_t value, unsigned mask, int source, Place place);  // the value of lane `source`

int lane();
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Shared memory of the running block: that of a declaration, known by an address of its own, and the launch's.
void* shared(const void* declaration, size_t bytes);
void* dynamic_shared();

// Runs a grid. Throws std::runtime_error with what was complained of.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

template <typename T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffled value has at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, mask, source >= 0 && source < 32 ? source : lane(), place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void check_alignment(const T* address, const char* access) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    complain("misaligned %zu-byte %s at %p", sizeof(T), access, static_cast<const void*>(address));
}

// What FM_LAUNCH makes, to be called with the kernel's arguments, which are copied as a launch copies them.
template <typename... Parameters>
struct Launcher {
  void (*kernel)(Parameters...);
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;

  template <typename... Arguments>
  void operator()(Arguments&&... arguments) const {
    const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
    run(name, grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
  }
};
template <typename... Parameters>
Launcher<Parameters...> launcher(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                                 size_t shared_bytes, void* /*stream*/) {
  return {kernel, name, grid, block, shared_bytes};
}

}  // namespace simt

#define SIMT_HERE (simt::Place{__FILE__, __LINE__})

// As csrc/common/launch.cuh defines them for nvcc.
#define FM_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  simt::launcher(kernel, #kernel, grid, block, shared_bytes, stream)
#define FM_SHARED(name, ...)                \
  static const char name##_declaration = 0; \
  using name##_type = __VA_ARGS__;          \
  auto& name = *static_cast<name##_type*>(simt::shared(&name##_declaration, sizeof(name##_type)))
#define FM_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(simt::dynamic_shared())

#define threadIdx (simt::thread_index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __syncthreads() simt::barrier(SIMT_HERE)
#define __shfl_down_sync(mask, value, offset) \
  simt::shuffle(mask, value, simt::lane() + static_cast<int>(offset), SIMT_HERE)

template <typename T>
__forceinline__ T __ldcs(const T* address) {
  simt::check_alignment(address, "load");
  return *address;
}
template <typename T>
__forceinline__ void __stcs(T* address, T value) {
  simt::check_alignment(address, "store");
  *address = value;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}
using std::max;
using std::min;

#include <cuda_runtime_api.h>
