// The control of adaptive steps and what follows from it, row by row; fmkernels/ops/step_control has the meaning.
//
// step_control: from the error norm of the step that was taken to accept or reject, the next step and a status.
// step_rows: requested states within the step, then accepted rows move on to its end.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/status.h"

namespace fm {

constexpr int max_stages = 16;
constexpr int max_degree = 8;

// The state: arrays [clock_rows][rows] and [count_rows][rows], in the order of Clock and Count in op.py.
enum ClockRow : int { at_t, at_h, at_t_end, at_ratio_1, at_ratio_2, at_t_from, at_h_taken, at_h_next, clock_rows };
enum CountRow : int {
  at_status,
  at_steps,
  at_accepted,
  at_failures,
  at_accept,
  at_first_output,
  at_next_output,
  count_rows
};

// In the order of Rules.numbers().
struct StepRules {
  double power, power_1, power_2;
  double safety, ifactor, dfactor, least_growth;
  double min_step, max_step;
  double max_steps, force_min_step, max_failures;
};

// Times at which a row's state is wanted: count of them, in the order of the solve, row r's at wanted + r * stride.
struct WantedTimes {
  const double* times;  // null: none
  int64_t count, stride;
};

// What `error` holds: norms of the step that was taken; or sizes of the first step; or what Hairer's rule makes one of,
// the norm of the change of the derivative over the trial step.
enum class StepPhase : int { taken, first, trial };

struct StepControlArguments {
  int64_t rows;
  double* clock;
  int32_t* count;
  Dtype dtype;        // f64 or f32, of
  const void* error;  // [rows]
  void* step;         // [rows] receives the next step
  Dtype time_dtype;
  void* times;  // [stages][rows] receives its times
  int stages;
  double nodes[max_stages];
  StepRules rules;
  WantedTimes wanted;
  StepPhase phase;
  const void* sizes;  // [2][rows] of dtype, norms of y and of its derivative: where the phase is `trial`
  double order;
};

struct StepRowsArguments {
  Dtype dtype;
  int64_t rows, inner;
  const double* clock;
  const int32_t* count;
  void* y;
  const void* y1;
  bool move;            // false: outputs only
  void* k0;             // receives the derivative at the new y
  const void* k0_from;  // where it is for rows that stay; may be k0
  const void* k_last;   // where it is for rows that move on
  // Outputs: states y + h sum_i b_i(theta) k_i.
  WantedTimes wanted;
  int stages;
  const void* k[max_stages];
  int degree;
  double polynomials[max_stages][max_degree];  // of theta, theta^2, ...
  const int64_t* ids;                          // [rows] places in out; null: 0, 1, ...
  void* out;
  int64_t out_stride;  // elements between the outputs of two times
};

// The step to where Hairer's rule looks at the derivative again, from sizes: into step, and its end into times' second
// row.
Status step_trial_cpu(const StepControlArguments& arguments);
Status step_trial_cuda(const StepControlArguments& arguments, void* stream);
Status step_control_cpu(const StepControlArguments& arguments);
Status step_control_cuda(const StepControlArguments& arguments, void* stream);
Status step_rows_cpu(const StepRowsArguments& arguments);
Status step_rows_cuda(const StepRowsArguments& arguments, void* stream);

}  // namespace fm
