// Adaptive steps of a batch: what happens between one network call and the next, on buffers that are made once.
//
// A plan forms the state of each Runge-Kutta stage, judges the step when the last output has come, and moves the rows
// that accept. It takes the network's outputs by their addresses, where they lie: whoever owns them keeps them until
// the next step has begun. On the CPU the host sees which rows accept; where all do, y and the new state swap their
// buffers and the last output becomes the derivative at y where it lies, so that nothing is copied.
#pragma once

#include <cstdint>
#include <vector>

#include "../combine/combine.h"
#include "../common/status.h"
#include "../step_control/step_control.h"

namespace fm {

// A Runge-Kutta method with an error estimate. Combination s < stages - 1 forms the state of stage s + 1, the last one
// the new state: y + h sum_i weights[s][i] k_columns[s][i].
struct StepTableau {
  std::vector<double> nodes;  // one a stage
  std::vector<std::vector<int>> columns;
  std::vector<std::vector<double>> weights;
  std::vector<double> error_weights;             // of the last combination's columns
  std::vector<std::vector<double>> polynomials;  // the dense output's b_i of theta, theta^2, ...
  double order = 1;
};

struct StepPlanSettings {
  StepTableau tableau;
  StepRules rules{};
  double atol = 0, rtol = 0;

  bool on_cpu = true;
  Dtype dtype = Dtype::f32, time_dtype = Dtype::f32;
  int64_t rows = 0, inner = 0;

  void *y = nullptr, *y1 = nullptr;  // states; y is in the first of them
  void* k0 = nullptr;                // the derivative at y, where it is no output
  double* clock = nullptr;
  int32_t* count = nullptr;
  void* step = nullptr;       // [rows], double for f64 states, else float, as are error and sizes
  void* times = nullptr;      // [stages][rows] of time_dtype
  void* error = nullptr;      // [rows]
  void* sizes = nullptr;      // [2][rows]
  void* workspace = nullptr;  // workspace_elements_cuda(rows * inner, rows) doubles on a GPU

  WantedTimes wanted{};          // outputs
  const int64_t* ids = nullptr;  // [rows] places in out; null: 0, 1, ...
  void* out = nullptr;
  int64_t out_stride = 0;  // elements between the outputs of two times
};

class StepPlan {
 public:
  // Whether an output may be taken as it lies.
  enum class Output {
    fits,
    overlaps_stage,  // in the memory of an earlier output that is still in use
    overlaps_state,  // in the memory of a state
    unexpected,      // no step is under way, or it has all its outputs
  };

  bool look = false;  // the caller looks at a step that was judged, and then calls move()
  bool steal = true;  // an output may become the derivative at y as it is

  // Throws std::invalid_argument where the settings contradict each other.
  explicit StepPlan(const StepPlanSettings& settings);

  bool on_cpu() const { return settings_.on_cpu; }
  int stages() const { return static_cast<int>(outputs_.size()); }
  int64_t state_bytes() const { return bytes_; }
  int current() const { return current_; }  // which of the two states y is in
  int stage() const { return at_; }         // whose output comes next
  int64_t running() const { return running_; }
  // After a move: whether the last output has become the derivative at y.
  bool took_last() const { return took_last_; }
  // After a move: whether the derivative at y is in k0.
  bool in_k0() const { return outputs_.front() == settings_.k0; }

  void set_derivative(const void* k) { outputs_.front() = k; }

  // The first stage's state. A step that was left in the middle is forgotten.
  Status first(void* stream);
  Output admits(const void* k) const;
  // The output of stage(): forms the next stage's state, or judges the step and, unless `look`, moves.
  Status take(const void* k);
  // Whether the step waits for move().
  bool judged() const { return judged_; }
  Status move();

  // The first step sizes have been written to the error norms.
  Status start(void* stream);
  // Hairer's rule for the first step: the trial step's time and state, for one more output.
  Status trial(void* stream);
  Output admits_trial(const void* k) const;
  Status begin(const void* k);

 private:
  struct Combination {
    CombineArguments arguments{};
    std::vector<int> columns;
  };

  char* state(int i) const { return static_cast<char*>(i == 0 ? settings_.y : settings_.y1); }
  bool overlap(const void* a, const void* b) const;
  bool overlaps_state(const void* k) const;
  int64_t real_bytes() const { return settings_.dtype == Dtype::f64 ? 8 : 4; }
  Status run(const CombineArguments& a) const;
  Status combine(Combination& c);
  CombineArguments combination_of(const std::vector<const void*>& operands) const;
  Status norm(const std::vector<const void*>& operands, const std::vector<double>& weights, void* norms) const;
  Status judge(StepPhase phase);
  void make_control();
  void make_combinations();
  void make_rows();

  StepPlanSettings settings_;
  int64_t bytes_;
  int current_ = 0;
  int at_ = 0;  // 0: no step is under way
  bool judged_ = false, took_last_ = false;
  int64_t running_ = 0;  // rows, after a move on the CPU
  void* stream_ = nullptr;
  std::vector<const void*> outputs_;  // of the stages; the first is the derivative at y
  std::vector<Combination> combinations_;
  StepControlArguments control_{};
  StepRowsArguments rows_{};
};

}  // namespace fm
