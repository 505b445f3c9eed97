// What the tests share: checks, random sizes, guarded arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/range.cuh"
#include "common/status.h"
#include "common/workspace.h"

namespace {

using namespace fm;

std::mt19937_64 generator(20240607);
int failures = 0;

#define CHECK(condition, ...)                               \
  do {                                                      \
    if (!(condition)) {                                     \
      if (++failures <= 15) {                               \
        std::printf("line %d: %s: ", __LINE__, #condition); \
        std::printf(__VA_ARGS__);                           \
        std::printf("\n");                                  \
      }                                                     \
    }                                                       \
  } while (0)

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
inline bool coin() { return pick(0, 1) == 1; }
inline double normal() { return std::normal_distribution<double>()(generator); }

constexpr Dtype dtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64};
inline double epsilon(Dtype dtype) {
  return dtype == Dtype::f64 ? 1e-15 : dtype == Dtype::f32 ? 1.2e-7 : dtype == Dtype::bf16 ? 8e-3 : 1e-3;
}

// A device array: misaligned on demand, with guards on both sides that nobody may touch.
class Array {
 public:
  Array() = default;
  Array(int64_t elements, int element_bytes, bool misaligned)
      : bytes_(elements * element_bytes), start_(64 + (misaligned ? element_bytes : 0)) {
    const size_t size = static_cast<size_t>((start_ + bytes_ + 64 + 63) / 64 * 64);
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, size)));
    size_ = static_cast<int64_t>(size);
    std::memset(memory_.get(), 0xFF, size);  // a NaN in every dtype
  }
  void* data() const { return memory_ ? memory_.get() + start_ : nullptr; }
  bool guarded() const {
    for (int64_t i = 0; i < size_; ++i)
      if ((i < start_ || i >= start_ + bytes_) && memory_.get()[i] != 0xFF) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  int64_t bytes_ = 0, start_ = 0, size_ = 0;
};

inline Array random_tensor(int64_t elements, Dtype dtype, bool misaligned) {
  Array array(elements, bytes_of(dtype), misaligned);
  for (int64_t i = 0; i < elements; ++i) store_scalar(array.data(), dtype, i, normal());
  return array;
}

inline double at(const void* data, Dtype dtype, int64_t i) { return load_scalar<double>(data, dtype, i); }

inline bool same(double a, double b) { return a == b || (a != a && b != b); }

inline bool near(double value, double expected, double tolerance) {
  return same(value, expected) || std::fabs(value - expected) <= tolerance;
}

struct Sizes {
  int64_t samples, sample_rows, inner, rows, elements;

  static Sizes random() {
    static const int64_t inners[] = {1,   2,    3,    4,    5,    7,    8,    12,   16,   31,   64,   77,
                                     257, 1000, 1024, 1025, 2883, 3072, 4090, 4096, 4099, 8190, 8200, 9001};
    Sizes s{};
    s.inner = inners[pick(0, 23)];
    s.sample_rows = pick(0, 2) == 0 ? pick(1, 40) : 1;
    s.samples = pick(1, std::max<int64_t>(1, std::min<int64_t>(3000, 40000 / (s.inner * s.sample_rows))));
    s.rows = s.samples * s.sample_rows;
    s.elements = s.rows * s.inner;
    return s;
  }
};

// What a launch needs for partial sums: NaN until it is written.
inline Array workspace(int64_t elements, int64_t groups, int64_t sums = 1) {
  return Array(std::max<int64_t>(1, sums * workspace_elements_cuda(elements, groups)), 8, false);
}

// The exit status of a test of some rounds.
inline int verdict(int rounds) {
  std::printf("%s: %d rounds, %d failures\n", failures == 0 ? "ok" : "FAILED", rounds, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
