// Runs the bodies of row_dots' CUDA kernels on the host, as test_cuda_bodies.cpp does with the others.
#include "bodies.h"
#include "row_dots/row_dots_body.cuh"

namespace {

// What row_dots_kernel or short_row_dots_kernel do with the threads' sums.
template <typename Shape>
void run_row_dots(const RowDotsParams<typename Shape::A>& p) {
  using A = typename Shape::A;
  const auto add = [&](double* sums, const RowDotsBody<Shape>& body) {
    for (int c = 0; c < Shape::products; ++c) sums[c] += static_cast<double>(body.sums[c]);
  };
  const Partition& partition = p.partition;
  std::vector<double> results(static_cast<size_t>(p.rows * p.pairs));
  const auto keep = [&](int64_t row, const double* sums, double ones) {
    for (int q = 0; q < p.pairs; ++q)
      results[static_cast<size_t>(row * p.pairs + q)] += p.product[q] < 0 ? ones : sums[p.product[q]];
  };
  for (int64_t row = 0; row < p.rows && p.lanes > 0; ++row) {
    CHECK(p.lanes <= 32 && (p.lanes & (p.lanes - 1)) == 0, "lanes %d", p.lanes);
    double sums[Shape::products] = {};
    for (int lane = 0; lane < p.lanes; ++lane) add(sums, row_dots_lane<Shape>(p, row, lane));
    keep(row, sums, static_cast<double>(p.inner));
  }
  for (int64_t b = 0; b < partition.blocks && p.lanes == 0; ++b) {
    double sums[Shape::products] = {};
    each_thread([&](int t) { add(sums, row_dots_thread<Shape>(p, b, t)); });
    int64_t begin, end;
    partition.range(b, begin, end);
    keep(b / partition.parts, sums, static_cast<double>(end - begin));
  }
  for (size_t k = 0; k < results.size(); ++k) p.out[k] = static_cast<A>(results[k]);
  const RowDotsBody<Shape> beyond = row_dots_lane<Shape>(p, p.rows, 0);
  for (A sum : beyond.sums) CHECK(p.lanes == 0 || sum == 0, "a row that is none adds %g", static_cast<double>(sum));
}

void test_row_dots() {
  const Sizes s = Sizes::random();
  RowDotsArguments a{};
  a.dtype = dtypes[pick(0, 3)];
  a.rows = coin() ? s.samples : s.rows;
  a.inner = s.elements / a.rows;
  a.count = static_cast<int>(pick(1, max_dot_tensors));
  a.pairs = static_cast<int>(pick(1, max_dot_pairs));
  const bool wide = a.dtype == Dtype::f64, misaligned = pick(0, 3) == 0;
  std::vector<Array> arrays;
  for (int k = 0; k < a.count; ++k) {
    arrays.push_back(random_tensor(s.elements, a.dtype, misaligned && coin()));
    a.tensors[k] = arrays.back().data();
  }
  for (int q = 0; q < a.pairs; ++q) {
    a.first[q] = static_cast<int>(pick(-1, a.count - 1));
    a.second[q] = static_cast<int>(pick(-1, a.count - 1));
  }
  Array out(a.rows * a.pairs, wide ? 8 : 4, false);
  a.out = out.data();
  CHECK(valid(a), "valid");
  choose_row_dots_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    run_row_dots<Shape>(make_row_dots_params<Shape>(a));
  });
  const auto value = [&](int k, int64_t i) { return k < 0 ? 1.0 : at(a.tensors[k], a.dtype, i); };
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int q = 0; q < a.pairs; ++q) {
      double expected = 0, magnitude = 0;
      for (int64_t i = row * a.inner; i < (row + 1) * a.inner; ++i) {
        const double term = value(a.first[q], i) * value(a.second[q], i);
        expected += term;
        magnitude += std::fabs(term);
      }
      const double got = at(a.out, wide ? Dtype::f64 : Dtype::f32, row * a.pairs + q);
      CHECK(near(got, expected, (wide ? 1e-13 : 4e-6) * magnitude),
            "row_dots dtype %d count %d rows %lld inner %lld pair (%d, %d) of row %lld: %g, expected %g",
            static_cast<int>(a.dtype), a.count, static_cast<long long>(a.rows), static_cast<long long>(a.inner),
            a.first[q], a.second[q], static_cast<long long>(row), got, expected);
    }
  }
  CHECK(out.guarded(), "row_dots");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) test_row_dots();
  return verdict(rounds);
}
