// Words, uniforms or normals of a Philox stream, written out. The codes are those of
// fmkernels/ops/random/kinds.py.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/status.h"

namespace fm {

enum class RandomKind : int { words = 0, uniform = 1, normal = 2 };

struct RandomArguments {
  RandomKind kind;
  Dtype dtype;  // of out; ignored for words, which are int64
  void* out;
  int64_t count;  // out[i] is number offset + i of the stream
  const int64_t* seed;
  int64_t stream;
  int64_t offset;
};

Status random_cpu(const RandomArguments& arguments);
Status random_cuda(const RandomArguments& arguments, void* stream);

}  // namespace fm
