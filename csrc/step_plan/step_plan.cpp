#include "step_plan.h"

#include <algorithm>
#include <stdexcept>

namespace fm {
namespace {

void expect(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

StepPlan::StepPlan(const StepPlanSettings& settings)
    : settings_(settings), bytes_(settings.rows * settings.inner * bytes_of(settings.dtype)) {
  const StepPlanSettings& s = settings_;
  const size_t stages = s.tableau.nodes.size();
  expect(stages >= 2 && stages <= static_cast<size_t>(max_stages), "StepPlan: nodes: expected 2 to 16 of them");
  expect(s.rows > 0 && s.inner > 0, "StepPlan: rows, inner: expected a state with elements");
  expect(s.y && s.y1 && s.k0 && s.clock && s.count && s.step && s.times && s.error && s.sizes,
         "StepPlan: expected the addresses of all buffers");
  expect((s.wanted.times == nullptr) == (s.out == nullptr), "StepPlan: wanted, out: expected both or none");
  outputs_.resize(stages, nullptr);
  make_control();
  make_combinations();
  make_rows();
}

void StepPlan::make_control() {
  const StepPlanSettings& s = settings_;
  StepControlArguments& a = control_;
  a.rows = s.rows;
  a.clock = s.clock;
  a.count = s.count;
  a.dtype = s.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  a.error = s.error;
  a.step = s.step;
  a.time_dtype = s.time_dtype;
  a.times = s.times;
  a.stages = stages();
  std::copy(s.tableau.nodes.begin(), s.tableau.nodes.end(), a.nodes);
  a.rules = s.rules;
  a.wanted = s.wanted;
  a.sizes = s.sizes;
  a.order = s.tableau.order;
}

// Coefficient i of a combination is its weight times the step; that of y is 1, in the error 0.
void StepPlan::make_combinations() {
  const StepTableau& t = settings_.tableau;
  const size_t count = outputs_.size();
  expect(t.columns.size() == count && t.weights.size() == count, "StepPlan: columns, weights: expected one a stage");
  for (size_t s = 0; s < count; ++s) {
    const std::vector<int>& columns = t.columns[s];
    const bool last = s + 1 == count;
    expect(columns.size() == t.weights[s].size() && columns.size() < static_cast<size_t>(max_operands) &&
               (!last || columns.size() == t.error_weights.size()),
           "StepPlan: weights: expected one a column");
    for (const int column : columns)
      expect(column >= 0 && column <= static_cast<int>(s), "StepPlan: columns: expected stages that came before");
    Combination c;
    c.columns = columns;
    CombineArguments& a = c.arguments;
    a.dtype = settings_.dtype;
    a.rows = a.samples = settings_.rows;
    a.inner = settings_.inner;
    a.count = 1 + static_cast<int>(columns.size());
    a.operands[0].coefficient = {nullptr, 1, 0, 1.0};
    a.operands[0].error = {nullptr, 1, 0, 0.0};
    for (size_t i = 0; i < columns.size(); ++i) {
      a.operands[i + 1].coefficient = {settings_.step, 1, 1, 0.0, t.weights[s][i]};
      if (last) a.operands[i + 1].error = {settings_.step, 1, 1, 0.0, t.error_weights[i]};
    }
    if (last) {
      a.has_error = true;
      a.atol = settings_.atol;
      a.rtol = settings_.rtol;
      a.norm = settings_.error;
      a.workspace = settings_.workspace;
    }
    combinations_.push_back(std::move(c));
  }
}

void StepPlan::make_rows() {
  const StepPlanSettings& s = settings_;
  const std::vector<std::vector<double>>& polynomials = s.tableau.polynomials;
  StepRowsArguments& a = rows_;
  a.dtype = s.dtype;
  a.rows = s.rows;
  a.inner = s.inner;
  a.clock = s.clock;
  a.count = s.count;
  a.k0 = s.k0;
  a.wanted = s.wanted;
  a.stages = stages();
  expect(polynomials.size() == outputs_.size(), "StepPlan: polynomials: expected one a stage");
  for (size_t i = 0; i < polynomials.size(); ++i) {
    expect(polynomials[i].size() <= static_cast<size_t>(max_degree), "StepPlan: polynomials: expected a lower degree");
    std::copy(polynomials[i].begin(), polynomials[i].end(), a.polynomials[i]);
    a.degree = std::max(a.degree, static_cast<int>(polynomials[i].size()));
  }
  a.ids = s.ids;
  a.out = s.out;
  a.out_stride = s.out_stride;
}

// ---------------------------------------------------------------------- a step

Status StepPlan::first(void* stream) {
  if (outputs_.front() == nullptr) return Status::bad_argument;
  stream_ = stream;
  at_ = 1;
  judged_ = false;
  return combine(combinations_[0]);
}

bool StepPlan::overlap(const void* a, const void* b) const {
  const uintptr_t x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  const uintptr_t size = static_cast<uintptr_t>(bytes_);
  return x < y + size && y < x + size;
}

// k0 is written by a move, also where it does not hold the derivative now.
bool StepPlan::overlaps_state(const void* k) const {
  return overlap(k, settings_.y) || overlap(k, settings_.y1) || overlap(k, settings_.k0);
}

StepPlan::Output StepPlan::admits(const void* k) const {
  if (at_ < 1 || at_ >= stages()) return Output::unexpected;
  for (int s = 0; s < at_; ++s)
    if (overlap(k, outputs_[static_cast<size_t>(s)])) return Output::overlaps_stage;
  return overlaps_state(k) ? Output::overlaps_state : Output::fits;
}

Status StepPlan::take(const void* k) {
  if (at_ < 1 || at_ >= stages()) return Status::bad_argument;
  outputs_[static_cast<size_t>(at_++)] = k;
  Status status = combine(combinations_[static_cast<size_t>(at_ - 1)]);
  if (status == Status::ok && at_ < stages()) return status;
  if (status == Status::ok) status = judge(StepPhase::taken);
  judged_ = status == Status::ok;
  if (status == Status::ok && !look) status = move();
  return status;
}

Status StepPlan::judge(StepPhase phase) {
  control_.phase = phase;
  return settings_.on_cpu ? step_control_cpu(control_) : step_control_cuda(control_, stream_);
}

Status StepPlan::move() {
  if (!judged_) return Status::bad_argument;
  judged_ = took_last_ = false;
  at_ = 0;
  StepRowsArguments& a = rows_;
  a.move = true;
  a.y = state(current_);
  a.y1 = state(1 - current_);
  std::copy(outputs_.begin(), outputs_.end(), a.k);
  a.k0_from = outputs_.front();
  a.k_last = outputs_.back();
  if (!settings_.on_cpu) return step_rows_cuda(a, stream_);

  const int64_t rows = settings_.rows;
  const int32_t *accept = settings_.count + at_accept * rows, *status = settings_.count + at_status * rows;
  int64_t accepted = 0;
  running_ = 0;
  for (int64_t r = 0; r < rows; ++r) {
    accepted += accept[r];
    running_ += status[r] == 0;
  }
  if (accepted == 0) return Status::ok;
  const bool whole = steal && accepted == rows;
  a.move = !whole;
  if (!whole || a.wanted.times != nullptr) {
    const Status moved = step_rows_cpu(a);
    if (moved != Status::ok) return moved;
  }
  took_last_ = whole;
  if (whole) current_ = 1 - current_;
  outputs_.front() = whole ? outputs_.back() : settings_.k0;
  return Status::ok;
}

// ---------------------------------------------------------------------- the first step

Status StepPlan::start(void* stream) {
  stream_ = stream;
  return judge(StepPhase::first);
}

Status StepPlan::trial(void* stream) {
  const void* slope = outputs_.front();
  if (slope == nullptr) return Status::bad_argument;
  stream_ = stream;
  char* sizes = static_cast<char*>(settings_.sizes);
  Status status = norm({state(current_)}, {1.0}, sizes);
  if (status == Status::ok) status = norm({state(current_), slope}, {0.0, 1.0}, sizes + settings_.rows * real_bytes());
  if (status == Status::ok) status = settings_.on_cpu ? step_trial_cpu(control_) : step_trial_cuda(control_, stream_);
  if (status != Status::ok) return status;
  CombineArguments a = combination_of({state(current_), slope});
  a.operands[1].coefficient = {control_.step, 1, 1, 0.0, 1.0};
  return run(a);
}

StepPlan::Output StepPlan::admits_trial(const void* k) const {
  if (outputs_.front() == nullptr) return Output::unexpected;
  if (overlap(k, outputs_.front())) return Output::overlaps_stage;
  return overlaps_state(k) ? Output::overlaps_state : Output::fits;
}

Status StepPlan::begin(const void* k) {
  const Status status = norm({state(current_), outputs_.front(), k}, {0.0, -1.0, 1.0}, settings_.error);
  return status == Status::ok ? judge(StepPhase::trial) : status;
}

// ---------------------------------------------------------------------- combinations

Status StepPlan::run(const CombineArguments& a) const {
  return settings_.on_cpu ? combine_cpu(a) : combine_cuda(a, stream_);
}

Status StepPlan::combine(Combination& c) {
  CombineArguments& a = c.arguments;
  a.out = state(1 - current_);
  a.operands[0].data = state(current_);
  for (size_t i = 0; i < c.columns.size(); ++i) a.operands[i + 1].data = outputs_[static_cast<size_t>(c.columns[i])];
  return run(a);
}

// y alone, of operands that begin with it.
CombineArguments StepPlan::combination_of(const std::vector<const void*>& operands) const {
  CombineArguments a{};
  a.dtype = settings_.dtype;
  a.out = state(1 - current_);
  a.rows = a.samples = settings_.rows;
  a.inner = settings_.inner;
  a.count = static_cast<int>(operands.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    a.operands[i].data = operands[i];
    a.operands[i].coefficient = {nullptr, 1, 0, i == 0 ? 1.0 : 0.0};
  }
  return a;
}

// Norms of a combination over the tolerance at y.
Status StepPlan::norm(const std::vector<const void*>& operands, const std::vector<double>& weights, void* norms) const {
  CombineArguments a = combination_of(operands);
  for (size_t i = 0; i < operands.size(); ++i) a.operands[i].error = {nullptr, 1, 0, weights[i]};
  a.has_error = true;
  a.atol = settings_.atol;
  a.rtol = settings_.rtol;
  a.norm = norms;
  a.workspace = settings_.workspace;
  return run(a);
}

}  // namespace fm
