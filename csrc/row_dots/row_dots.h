// out[row][p] = sum over a row of tensors[first[p]] tensors[second[p]], all pairs in one pass over the tensors.
//
// Index -1 stands for ones. Sums are accumulated in float (double for f64 data) over short stretches and in double
// beyond, in a fixed order: two calls are bitwise equal.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/macros.h"
#include "../common/status.h"

namespace fm {

constexpr int max_dot_tensors = 6;
constexpr int max_dot_pairs = 16;

struct RowDotsArguments {
  Dtype dtype;  // of every tensor
  int64_t rows, inner;
  int count;  // 1 .. max_dot_tensors
  const void* tensors[max_dot_tensors];
  int pairs;  // 1 .. max_dot_pairs
  int first[max_dot_pairs], second[max_dot_pairs];
  void* out;        // [rows][pairs] float, or double for f64 data
  void* workspace;  // pairs * workspace_elements_cuda(rows * inner, rows) doubles
};

FM_HOST_DEVICE bool valid(const RowDotsArguments& a) {
  if (a.count < 1 || a.count > max_dot_tensors || a.pairs < 1 || a.pairs > max_dot_pairs) return false;
  for (int p = 0; p < a.pairs; ++p)
    if (a.first[p] < -1 || a.first[p] >= a.count || a.second[p] < -1 || a.second[p] >= a.count) return false;
  return true;
}

Status row_dots_cpu(const RowDotsArguments& arguments);
Status row_dots_cuda(const RowDotsArguments& arguments, void* stream);

}  // namespace fm
