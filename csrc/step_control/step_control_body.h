// One row's control, in double; the same on the CPU and on a GPU. See step_control/step_control.h.
#pragma once

#include <cmath>

#include "../common/float16.h"
#include "../common/macros.h"
#include "step_control.h"

namespace fm {

enum StepStatus : int { step_running, step_success, step_max_steps, step_non_finite, step_min_step };

struct StepRow {
  double t, h, t_end, ratio_1, ratio_2, t_from, h_taken, h_next;
  int32_t status, steps, accepted, failures;
  bool accept;
};

FM_HOST_DEVICE double smaller(double a, double b) { return a < b ? a : b; }
FM_HOST_DEVICE double larger(double a, double b) { return a > b ? a : b; }

// An error norm below this counts as this: no factor is infinite.
constexpr double least_ratio = 1e-10;
// A step that would leave less than this much of itself to the end goes there.
constexpr double step_stretch = 1.01;

// The factor of the step size after a finite error norm.
FM_HOST_DEVICE double step_factor(const StepRules& rules, const StepRow& row, double ratio, bool accept) {
  double factor = rules.safety * pow(ratio, rules.power);
  if (rules.power_1 != 0) factor *= pow(row.ratio_1, rules.power_1);
  if (rules.power_2 != 0) factor *= pow(row.ratio_2, rules.power_2);
  const double low = ratio < 1 ? rules.least_growth : rules.dfactor;
  const double high = accept ? rules.ifactor : smaller(rules.ifactor, rules.safety);
  return smaller(high, larger(low, factor));
}

// error: the norm of the step just taken, or with start the size of the first one.
FM_HOST_DEVICE void control_row(const StepRules& rules, double error, bool start, StepRow& row) {
  if (row.status != step_running) {
    row.accept = false;
    row.h = 0;
    if (!start) {
      row.t_from = row.t;
      row.h_taken = 0;
    }
    return;
  }
  const bool finite = error - error == 0;
  const bool at_minimum = fabs(row.h) <= rules.min_step;
  double magnitude = error;
  row.accept = false;
  if (start) {
    if (!finite) row.failures = static_cast<int32_t>(rules.max_failures);
  } else {
    row.accept = error <= 1 || (rules.force_min_step != 0 && finite && at_minimum);
    ++row.steps;
    row.accepted += row.accept ? 1 : 0;
    row.failures = finite ? 0 : row.failures + 1;
    const double ratio = finite ? larger(error, least_ratio) : 1;
    magnitude = fabs(row.h) * (finite ? step_factor(rules, row, ratio, row.accept) : rules.dfactor);
    row.t_from = row.t;
    row.h_taken = row.h;
    if (row.accept) {
      row.ratio_2 = row.ratio_1;
      row.ratio_1 = ratio;
      row.t = row.h == row.t_end - row.t ? row.t_end : row.t + row.h;
    }
  }
  const double remaining = row.t_end - row.t;
  const double wanted = magnitude > rules.max_step ? rules.max_step : magnitude;
  magnitude = wanted < rules.min_step ? rules.min_step : wanted;
  const bool last = smaller(magnitude * step_stretch, rules.max_step) >= fabs(remaining);
  row.h = last ? remaining : copysign(magnitude, remaining);
  row.h_next = copysign(magnitude, row.t_end - row.t_from);
  const bool stuck = row.t + row.h == row.t || (wanted < rules.min_step && at_minimum && !row.accept && !start);
  if (remaining == 0)
    row.status = step_success;
  else if (row.steps >= rules.max_steps)
    row.status = step_max_steps;
  else if (row.failures >= rules.max_failures)
    row.status = step_non_finite;
  else if (stuck)
    row.status = finite ? step_min_step : step_non_finite;
  if (row.status != step_running) row.h = 0;
}

// Hairer, Norsett, Wanner 1993, II.4: from the norms of y and y' over the tolerance.
FM_HOST_DEVICE double trial_size(double y, double slope) { return y < 1e-5 || slope < 1e-5 ? 1e-6 : 0.01 * y / slope; }

// And from that of the change of y' over a step of that size. NaN where y' is not finite.
FM_HOST_DEVICE double first_size(double y, double slope, double change, double order) {
  const double trial = trial_size(y, slope), curvature = change / trial;
  const double most = slope > curvature ? slope : curvature;
  const double size = smaller(100 * trial, most <= 1e-15 ? larger(1e-6, 1e-3 * trial) : pow(0.01 / most, 1 / order));
  // a trial step may leave the domain: then its own size is all that is known
  const bool finite = curvature - curvature == 0 && size - size == 0;
  return (finite ? size : trial) + 0 * (y + slope);
}

// Time number stage of the next step.
FM_HOST_DEVICE double stage_time(double node, const StepRow& row) {
  if (node == 1 && row.h == row.t_end - row.t) return row.t_end;
  return row.t + node * row.h;
}

template <typename T>
FM_HOST_DEVICE void store_time(void* times, Dtype dtype, int64_t i, T value) {
  if (dtype == Dtype::f64)
    static_cast<double*>(times)[i] = value;
  else if (dtype == Dtype::f32)
    static_cast<float*>(times)[i] = static_cast<float>(value);
  else if (dtype == Dtype::bf16)
    static_cast<uint16_t*>(times)[i] = float_to_bf16(static_cast<float>(value));
  else
    static_cast<uint16_t*>(times)[i] = float_to_f16(static_cast<float>(value));
}

// The wanted times up to t, of those from `next` on; `direction` is that of the solve, 0 for an empty interval.
FM_HOST_DEVICE int32_t outputs_until(const WantedTimes& wanted, int64_t row, int32_t next, double t, double direction) {
  const double* times = wanted.times + row * wanted.stride;
  while (next < wanted.count && (times[next] - t) * direction <= 0) ++next;
  return next;
}

FM_HOST_DEVICE double load_real(const void* data, Dtype dtype, int64_t i) {
  return dtype == Dtype::f64 ? static_cast<const double*>(data)[i]
                             : static_cast<double>(static_cast<const float*>(data)[i]);
}

FM_HOST_DEVICE void store_real(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::f64)
    static_cast<double*>(data)[i] = value;
  else
    static_cast<float*>(data)[i] = static_cast<float>(value);
}

// The trial step does not leave the interval.
FM_HOST_DEVICE void trial_thread(const StepControlArguments& a, int64_t r) {
  const double t = a.clock[at_t * a.rows + r], span = a.clock[at_t_end * a.rows + r] - t;
  const double size = trial_size(load_real(a.sizes, a.dtype, r), load_real(a.sizes, a.dtype, a.rows + r));
  const double step = size == size ? copysign(smaller(size, fabs(span)), span) : 0;
  store_real(a.step, a.dtype, r, step);
  store_time(a.times, a.time_dtype, a.rows + r, t + step);
}

FM_HOST_DEVICE void control_thread(const StepControlArguments& a, int64_t r) {
  double* clock = a.clock + r;
  int32_t* count = a.count + r;
  const int64_t n = a.rows;
  StepRow row{clock[at_t * n],
              clock[at_h * n],
              clock[at_t_end * n],
              clock[at_ratio_1 * n],
              clock[at_ratio_2 * n],
              clock[at_t_from * n],
              clock[at_h_taken * n],
              clock[at_h_next * n],
              count[at_status * n],
              count[at_steps * n],
              count[at_accepted * n],
              count[at_failures * n],
              false};
  double error = load_real(a.error, a.dtype, r);
  if (a.phase == StepPhase::trial)
    error = first_size(load_real(a.sizes, a.dtype, r), load_real(a.sizes, a.dtype, n + r), error, a.order);
  const bool start = a.phase != StepPhase::taken;
  control_row(a.rules, error, start, row);
  clock[at_t * n] = row.t;
  clock[at_h * n] = row.h;
  clock[at_ratio_1 * n] = row.ratio_1;
  clock[at_ratio_2 * n] = row.ratio_2;
  clock[at_t_from * n] = row.t_from;
  clock[at_h_taken * n] = row.h_taken;
  clock[at_h_next * n] = row.h_next;
  count[at_status * n] = row.status;
  count[at_steps * n] = row.steps;
  count[at_accepted * n] = row.accepted;
  count[at_failures * n] = row.failures;
  count[at_accept * n] = row.accept ? 1 : 0;
  store_real(a.step, a.dtype, r, row.h);
  for (int s = 0; s < a.stages; ++s) store_time(a.times, a.time_dtype, s * n + r, stage_time(a.nodes[s], row));
  if (a.wanted.times != nullptr) {
    int32_t next = count[at_next_output * n];
    count[at_first_output * n] = next;
    const double direction = row.t_end - row.t_from;
    if (row.accept || start)
      next = outputs_until(a.wanted, r, next, row.t, direction > 0 ? 1.0 : direction < 0 ? -1.0 : 0.0);
    count[at_next_output * n] = next;
  }
}

// h b_i(theta)
FM_HOST_DEVICE double dense_weight(const double* polynomial, int degree, double theta, double h) {
  double weight = 0;
  for (int d = degree - 1; d >= 0; --d) weight = (weight + polynomial[d]) * theta;
  return weight * h;
}

}  // namespace fm
