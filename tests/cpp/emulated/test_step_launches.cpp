// Runs launches of step_rows whole, and compares them with step_rows_cpu and plain loops.
#include "../cases.h"
#include "step_control/step_rows_body.cuh"

namespace {

struct Case {
  Sizes s = Sizes::random();
  Dtype dtype = dtypes[pick(0, 3)];
  bool misaligned = pick(0, 3) == 0, stride_zero = coin(), has_ids = coin(), own_k0 = coin();
  int stages = static_cast<int>(pick(2, 8)), degree = static_cast<int>(pick(1, 4));
  int64_t rows = s.samples, inner = s.elements / s.samples, times = pick(1, 5), places = rows + pick(0, 3);
  std::vector<double> clock, wanted;
  std::vector<int32_t> count;
  std::vector<int64_t> ids;
  std::vector<Array> stage_arrays;
  Array y, y1, k0, k0_from, out;
  StepRowsArguments a{};

  Case() {
    clock.resize(static_cast<size_t>(clock_rows * rows));
    count.resize(static_cast<size_t>(count_rows * rows));
    wanted.resize(static_cast<size_t>((stride_zero ? 1 : rows) * times));
    for (size_t j = 0; j < wanted.size(); ++j) wanted[j] = static_cast<double>(j % static_cast<size_t>(times)) + 1;
    for (int64_t r = 0; r < rows; ++r) {
      const bool accept = pick(0, 2) != 0;
      const int64_t first = pick(0, times), next = accept ? pick(first, times) : first;
      const auto put = [&](int field, double value) { clock[static_cast<size_t>(field * rows + r)] = value; };
      const auto set = [&](int field, int64_t value) {
        count[static_cast<size_t>(field * rows + r)] = static_cast<int32_t>(value);
      };
      set(at_accept, accept);
      set(at_first_output, first);
      set(at_next_output, next);
      const double end = next > first && coin() ? static_cast<double>(next) : static_cast<double>(next) + 0.5;
      const double begin = static_cast<double>(first) + 0.25;
      put(at_t_from, begin);
      put(at_h_taken, accept ? end - begin : 1.5);
      put(at_t, accept ? end : begin);
    }
    const int64_t n = rows * inner;
    y = random_tensor(n, dtype, misaligned && coin());
    y1 = random_tensor(n, dtype, misaligned && coin());
    k0 = random_tensor(n, dtype, misaligned && coin());
    k0_from = random_tensor(n, dtype, misaligned && coin());
    out = random_tensor(times * places * inner, dtype, misaligned && coin());
    a.dtype = dtype;
    a.rows = rows;
    a.inner = inner;
    a.clock = clock.data();
    a.count = count.data();
    a.y = y.data();
    a.y1 = y1.data();
    a.move = pick(0, 3) != 0;
    a.k0 = k0.data();
    a.k0_from = own_k0 ? k0.data() : k0_from.data();
    a.wanted = {pick(0, 3) == 0 ? nullptr : wanted.data(), times, stride_zero ? 0 : times};
    a.stages = stages;
    a.degree = degree;
    for (int k = 0; k < stages; ++k) {
      stage_arrays.push_back(random_tensor(n, dtype, misaligned && coin()));
      a.k[k] = stage_arrays.back().data();
      for (int d = 0; d < degree; ++d) a.polynomials[k][d] = pick(0, 4) == 0 ? 0 : normal();
    }
    a.k_last = a.k[stages - 1];
    for (int64_t r = 0; r < rows; ++r) ids.push_back(places - 1 - r);
    if (has_ids) a.ids = ids.data();
    a.out = out.data();
    a.out_stride = places * inner;
    // NaN stays where a row is rejected, and does not spread
    for (int64_t r = 0; r < rows; ++r)
      if (count[static_cast<size_t>(at_accept * rows + r)] == 0)
        store_scalar(a.k[1] == a.k_last ? y1.data() : const_cast<void*>(a.k[1]), dtype, r * inner, std::nan(""));
  }

  std::vector<double> read(const Array& array, int64_t n) const {
    std::vector<double> values(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = at(array.data(), dtype, i);
    return values;
  }
};

void test_rows() {
  const Case c;
  const StepRowsArguments& a = c.a;
  const int64_t n = a.rows * a.inner, outputs = c.times * c.places * a.inner;
  std::vector<double> y = c.read(c.y, n), k0 = c.read(c.k0, n), out = c.read(c.out, outputs), slack(out.size());
  const std::vector<double> y_before = y, y1 = c.read(c.y1, n), from = c.own_k0 ? k0 : c.read(c.k0_from, n);
  std::vector<std::vector<double>> k;
  for (const Array& stage : c.stage_arrays) k.push_back(c.read(stage, n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = i / a.inner;
    const size_t at_i = static_cast<size_t>(i);
    const auto clock = [&](int field) { return a.clock[field * a.rows + row]; };
    const auto count = [&](int field) { return a.count[field * a.rows + row]; };
    for (int32_t j = count(at_first_output); a.wanted.times != nullptr && count(at_accept) && j < count(at_next_output);
         ++j) {
      const double time = a.wanted.times[row * a.wanted.stride + j];
      const double theta = (time - clock(at_t_from)) / clock(at_h_taken);
      double value = y_before[at_i], magnitude = std::fabs(value);
      for (int s = 0; s < a.stages; ++s) {
        double weight = 0, power = theta;
        for (int d = 0; d < a.degree; ++d, power *= theta) weight += a.polynomials[s][d] * power;
        value += clock(at_h_taken) * weight * k[static_cast<size_t>(s)][at_i];
        magnitude += std::fabs(clock(at_h_taken) * weight * k[static_cast<size_t>(s)][at_i]);
      }
      const size_t place =
          static_cast<size_t>(j * a.out_stride + (a.ids == nullptr ? row : a.ids[row]) * a.inner + i % a.inner);
      out[place] = time == clock(at_t) ? y1[at_i] : value;
      slack[place] = time == clock(at_t) ? 0 : epsilon(c.dtype) * 4 * magnitude;
    }
    if (!a.move) continue;
    y[at_i] = count(at_accept) ? y1[at_i] : y_before[at_i];
    k0[at_i] = count(at_accept) ? k.back()[at_i] : from[at_i];
  }

  // the CPU's on copies, the GPU's in place
  Array cpu_y = random_tensor(n, c.dtype, false), cpu_k0 = random_tensor(n, c.dtype, false),
        cpu_out = random_tensor(outputs, c.dtype, false);
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements * bytes_of(c.dtype)); };
  std::memcpy(cpu_y.data(), c.y.data(), bytes(n));
  std::memcpy(cpu_k0.data(), c.k0.data(), bytes(n));
  std::memcpy(cpu_out.data(), c.out.data(), bytes(outputs));
  StepRowsArguments cpu = a;
  cpu.y = cpu_y.data();
  cpu.k0 = cpu_k0.data();
  cpu.k0_from = c.own_k0 ? cpu_k0.data() : a.k0_from;
  cpu.out = cpu_out.data();
  CHECK(step_rows_cpu(cpu) == Status::ok, "status");
  CHECK(step_rows_cuda(a, nullptr) == Status::ok, "status");

  const auto compare = [&](const Array& array, const std::vector<double>& expected, const char* what) {
    const bool tolerant = expected.size() == slack.size() && &expected == &out;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double got = at(array.data(), c.dtype, static_cast<int64_t>(i));
      CHECK(near(got, expected[i], tolerant ? slack[i] : 0), "%s dtype %d rows %lld inner %lld at %zu: %g, expected %g",
            what, static_cast<int>(c.dtype), static_cast<long long>(a.rows), static_cast<long long>(a.inner), i, got,
            expected[i]);
    }
    CHECK(array.guarded(), "%s", what);
  };
  compare(c.y, y, "y");
  compare(c.k0, k0, "k0");
  compare(c.out, out, "out");
  compare(cpu_y, y, "y, CPU");
  compare(cpu_k0, k0, "k0, CPU");
  compare(cpu_out, out, "out, CPU");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) test_rows();
  return verdict(rounds);
}
