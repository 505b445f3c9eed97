// y = sum_i c_i[row] k_i in one pass, accumulated in float (double for f64 data) and rounded once.
//
// Optionally, per sample, norm = sqrt(mean((e / (atol + rtol max(|k_0|, |y|)))^2)), where e = sum_i
// error_i[row] k_i, or y where has_error is false, and y is taken before rounding. Sums run in a fixed order:
// two calls are bitwise equal.
#pragma once

#include <cstdint>

#include "../common/operand.h"
#include "../common/status.h"

namespace fm {

struct CombineArguments {
  Dtype dtype;  // of out, of every tensor operand, and to which noise is rounded
  void* out;    // may be operands[0].data (in place); a row whose one coefficient is 1 is then left as it is
  int64_t rows, inner;
  int count;  // 1 .. max_operands; operands[0] is a tensor
  Operand operands[max_operands];
  bool has_error;
  double atol, rtol;
  void* norm;       // [samples] float, or double for f64 data; null for no norm
  int64_t samples;  // rows is a multiple of it where norm is given
  void* workspace;  // workspace_elements_cuda(rows * inner, samples) doubles where norm is given
};

Status combine_cpu(const CombineArguments& arguments);
Status combine_cuda(const CombineArguments& arguments, void* stream);

}  // namespace fm
