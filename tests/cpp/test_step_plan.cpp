// The engine of adaptive steps on the CPU, driven as a caller would: a solve against the exact solution, requested
// states, outputs that lie where they must not, and calls in an order that makes no sense.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cases.h"
#include "step_plan/step_plan.h"

namespace {

using Output = StepPlan::Output;

// Bogacki and Shampine 1989, order 3(2); its last stage is the first of the next step.
StepTableau tableau() {
  StepTableau t;
  t.nodes = {0.0, 0.5, 0.75, 1.0};
  t.columns = {{0}, {1}, {0, 1, 2}, {0, 1, 2, 3}};
  t.weights = {{0.5}, {0.75}, {2.0 / 9, 1.0 / 3, 4.0 / 9}, {2.0 / 9, 1.0 / 3, 4.0 / 9, 0.0}};
  t.error_weights = {2.0 / 9 - 7.0 / 24, 1.0 / 3 - 0.25, 4.0 / 9 - 1.0 / 3, -0.125};
  // cubic Hermite: the values and slopes of both ends
  t.polynomials = {{1.0, -4.0 / 3, 5.0 / 9}, {0.0, 1.0, -2.0 / 3}, {0.0, 4.0 / 3, -8.0 / 9}, {0.0, -1.0, 1.0}};
  t.order = 3;
  return t;
}

// dy/dt = -rate y, a rate a row, from t = 0 to 1.
struct Solve {
  static constexpr int64_t rows = 3, inner = 5, size = rows * inner, stages = 4, times_wanted = 4;
  std::vector<double> y = std::vector<double>(size, 1.0), y1 = std::vector<double>(size),
                      k0 = std::vector<double>(size);
  std::vector<double> clock = std::vector<double>(clock_rows * rows, 0.0);
  std::vector<int32_t> count = std::vector<int32_t>(count_rows * rows, 0);
  std::vector<double> step = std::vector<double>(rows), times = std::vector<double>(stages * rows),
                      error = std::vector<double>(rows), sizes = std::vector<double>(2 * rows);
  std::vector<double> wanted = {0.0, 0.3, 0.8, 1.0};
  std::vector<double> out = std::vector<double>(times_wanted * size, std::nan(""));
  std::vector<std::vector<double>> k = std::vector<std::vector<double>>(64);
  size_t next_k = 0;
  double rates[rows] = {0.5, 2.0, 8.0};

  StepPlanSettings settings(bool outputs) {
    StepPlanSettings s;
    s.tableau = tableau();
    s.rules = {-1.0 / 3, 0, 0, 0.9, 10, 0.2, 1, 0, std::numeric_limits<double>::infinity(), 1000, 0, 20};
    s.atol = s.rtol = 1e-6;
    s.dtype = s.time_dtype = Dtype::f64;
    s.rows = rows;
    s.inner = inner;
    s.y = y.data();
    s.y1 = y1.data();
    s.k0 = k0.data();
    s.clock = clock.data();
    s.count = count.data();
    s.step = step.data();
    s.times = times.data();
    s.error = error.data();
    s.sizes = sizes.data();
    if (outputs) {
      s.wanted = {wanted.data(), times_wanted, 0};
      s.out = out.data();
      s.out_stride = size;
    }
    for (int64_t r = 0; r < rows; ++r) {
      clock[static_cast<size_t>(at_t_end * rows + r)] = 1.0;
      clock[static_cast<size_t>(at_ratio_1 * rows + r)] = clock[static_cast<size_t>(at_ratio_2 * rows + r)] = 1.0;
    }
    return s;
  }

  const double* field(const double* state) {
    std::vector<double>& out = k[next_k++ % k.size()];
    out.resize(size);
    for (int64_t i = 0; i < size; ++i) out[static_cast<size_t>(i)] = -rates[i / inner] * state[i];
    return out.data();
  }
  const double* state(const StepPlan& plan) { return plan.current() == 0 ? y.data() : y1.data(); }
  double* other(const StepPlan& plan) { return plan.current() == 0 ? y1.data() : y.data(); }

  void begin(StepPlan& plan) {
    plan.set_derivative(field(y.data()));
    CHECK(plan.trial(nullptr) == Status::ok, "trial");
    const double* trial = field(y1.data());
    CHECK(plan.admits_trial(trial) == Output::fits && plan.begin(trial) == Status::ok, "begin");
  }
  void step_once(StepPlan& plan) {
    CHECK(plan.first(nullptr) == Status::ok, "first");
    for (int64_t s = 1; s < stages; ++s) {
      const double* output = field(other(plan));
      CHECK(plan.admits(output) == Output::fits && plan.take(output) == Status::ok, "stage %d", static_cast<int>(s));
    }
  }
};

void test_a_solve(bool steal, bool outputs) {
  Solve solve;
  StepPlan plan(solve.settings(outputs));
  plan.steal = steal;
  solve.begin(plan);
  bool swapped = false;
  int steps = 0;
  for (; steps < 500; ++steps) {
    solve.step_once(plan);
    swapped = swapped || plan.took_last();
    if (plan.running() == 0) break;
  }
  CHECK(steps > 5 && steps < 500, "%d steps", steps);
  CHECK(swapped == steal, "an output became the derivative: %d", swapped);
  for (int64_t r = 0; r < Solve::rows; ++r) {
    const int64_t i = r * Solve::inner;
    CHECK(near(solve.state(plan)[i], std::exp(-solve.rates[r]), 1e-5), "row %d", static_cast<int>(r));
    for (int64_t j = 1; outputs && j < Solve::times_wanted; ++j)
      CHECK(near(solve.out[static_cast<size_t>(j * Solve::size + i)],
                 std::exp(-solve.rates[r] * solve.wanted[static_cast<size_t>(j)]), 1e-4),
            "row %d at time %d", static_cast<int>(r), static_cast<int>(j));
  }
}

void test_looking_before_moving() {
  Solve solve;
  StepPlan plan(solve.settings(false));
  plan.look = true;
  solve.begin(plan);
  CHECK(plan.move() == Status::bad_argument, "a move before a step");
  solve.step_once(plan);
  CHECK(plan.judged() && solve.state(plan)[0] == 1.0, "the state stays while the caller looks");
  CHECK(plan.move() == Status::ok && !plan.judged(), "move");
  CHECK(plan.move() == Status::bad_argument, "a second move");
}

void test_outputs_in_memory_that_is_in_use() {
  Solve solve;
  StepPlan plan(solve.settings(false));
  solve.begin(plan);
  plan.first(nullptr);
  const double* k1 = solve.field(solve.other(plan));
  CHECK(plan.take(k1) == Status::ok, "take");
  CHECK(plan.admits(k1) == Output::overlaps_stage && plan.admits(k1 + 1) == Output::overlaps_stage,
        "an earlier output");
  CHECK(plan.admits(solve.y.data()) == Output::overlaps_state, "the state");
  CHECK(plan.admits(solve.y1.data() + 1) == Output::overlaps_state, "the other state");
  CHECK(plan.admits(solve.k0.data()) == Output::overlaps_state, "where a move puts the derivative");
}

void test_a_step_left_in_the_middle_is_forgotten() {
  Solve left, whole;
  StepPlan first(left.settings(false)), second(whole.settings(false));
  left.begin(first);
  whole.begin(second);
  first.first(nullptr);
  first.take(left.field(left.other(first)));  // and then the network raises
  for (int i = 0; i < 3; ++i) {
    left.step_once(first);
    whole.step_once(second);
  }
  for (int64_t i = 0; i < Solve::size; ++i) CHECK(left.state(first)[i] == whole.state(second)[i], "element");
}

void test_calls_out_of_order() {
  Solve solve;
  StepPlan plan(solve.settings(false));
  CHECK(plan.first(nullptr) == Status::bad_argument, "a step without a derivative");
  CHECK(plan.trial(nullptr) == Status::bad_argument, "a trial without a derivative");
  const double* k = solve.field(solve.y.data());
  CHECK(plan.admits(k) == Output::unexpected && plan.take(k) == Status::bad_argument, "an output before a step");
  solve.begin(plan);
  solve.step_once(plan);
  CHECK(plan.admits(k) == Output::unexpected && plan.take(k) == Status::bad_argument, "an output after a step");
}

template <typename Spoil>
void expect_refusal(const char* what, Spoil spoil) {
  Solve solve;
  StepPlanSettings settings = solve.settings(true);
  spoil(settings);
  bool refused = false;
  try {
    StepPlan plan(settings);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused, "%s", what);
}

void test_settings_that_contradict_each_other() {
  expect_refusal("no nodes", [](StepPlanSettings& s) { s.tableau.nodes.clear(); });
  expect_refusal("a weight too few", [](StepPlanSettings& s) { s.tableau.weights[2].pop_back(); });
  expect_refusal("an error weight too few", [](StepPlanSettings& s) { s.tableau.error_weights.pop_back(); });
  expect_refusal("a later stage", [](StepPlanSettings& s) { s.tableau.columns[0][0] = 1; });
  expect_refusal("a polynomial too few", [](StepPlanSettings& s) { s.tableau.polynomials.pop_back(); });
  expect_refusal("a polynomial too long", [](StepPlanSettings& s) { s.tableau.polynomials[0].resize(max_degree + 1); });
  expect_refusal("no rows", [](StepPlanSettings& s) { s.rows = 0; });
  expect_refusal("no buffer", [](StepPlanSettings& s) { s.times = nullptr; });
  expect_refusal("times without a place", [](StepPlanSettings& s) { s.out = nullptr; });
}

}  // namespace

int main() {
  for (const bool steal : {false, true})
    for (const bool outputs : {false, true}) test_a_solve(steal, outputs);
  test_looking_before_moving();
  test_outputs_in_memory_that_is_in_use();
  test_a_step_left_in_the_middle_is_forgotten();
  test_calls_out_of_order();
  test_settings_that_contradict_each_other();
  return verdict(1);
}
