// loss = scale sum_elements mask weight rho(pred - u), u = sum_i c_i[row] k_i, and d loss / d pred in the
// same pass.
//
// Where the mask is false, or masked rows hold NaN, neither loss nor gradient sees it: the gradient there is
// 0. Sums run in a fixed order, without float atomics: two calls are bitwise equal.
#pragma once

#include <cstdint>

#include "../common/operand.h"
#include "../common/status.h"
#include "penalty.h"

namespace fm {

constexpr int max_loss_operands = 3;

struct RegressionLossArguments {
  Dtype pred_dtype;
  const void* pred;
  void* grad;   // pred's dtype; null: loss only
  Dtype dtype;  // of the operands, and to which noise is rounded; may differ from pred's
  int64_t rows, inner;
  int count;  // 1 .. max_loss_operands
  Operand operands[max_loss_operands];
  Coefficient weight;     // per row
  Coefficient scale;      // per row: one number, or one a group
  bool scale_grad;        // false: the gradient is that of the sum before the scale
  const bool* mask;       // null: everything counts
  int64_t mask_elements;  // elements that one entry of the mask covers: 1, or a multiple of inner
  Penalty kind;
  double delta;
  void* loss;       // [groups], float; double where pred_dtype or dtype is f64
  int64_t groups;   // 1, or the samples of a per-sample loss; rows is a multiple of it
  void* workspace;  // workspace_elements_cuda(rows * inner, groups) doubles
};

Status regression_loss_cpu(const RegressionLossArguments& arguments);
Status regression_loss_cuda(const RegressionLossArguments& arguments, void* stream);

}  // namespace fm
