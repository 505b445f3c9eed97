// Runs launches of row_dots whole, as test_launches.cpp does with the others.
#include "../cases.h"
#include "row_dots/row_dots_body.cuh"

namespace {

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
  const Array scratch = workspace(s.elements, a.rows, a.pairs);
  a.workspace = scratch.data();
  CHECK(row_dots_cuda(a, nullptr) == Status::ok, "row_dots");
  // the sums of a row depend neither on other rows nor on its place
  const int64_t alone = pick(0, a.rows - 1);
  RowDotsArguments one = a;
  one.rows = 1;
  for (int k = 0; k < a.count; ++k)
    one.tensors[k] = static_cast<const char*>(a.tensors[k]) + alone * a.inner * bytes_of(a.dtype);
  const Array one_out(a.pairs, wide ? 8 : 4, false), one_scratch = workspace(a.inner, 1, a.pairs);
  one.out = one_out.data();
  one.workspace = one_scratch.data();
  CHECK(row_dots_cuda(one, nullptr) == Status::ok, "row_dots");
  for (int q = 0; q < a.pairs; ++q) {
    const Dtype kind = wide ? Dtype::f64 : Dtype::f32;
    CHECK(same(at(one.out, kind, q), at(a.out, kind, alone * a.pairs + q)), "row %lld of %lld alone, inner %lld",
          static_cast<long long>(alone), static_cast<long long>(a.rows), static_cast<long long>(a.inner));
  }
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
  CHECK(out.guarded() && scratch.guarded(), "row_dots");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) test_row_dots();
  return verdict(rounds);
}
