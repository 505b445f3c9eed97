// Runs launches of combine, regression_loss and random whole, on random shapes, and compares with plain loops in
// double: lookups, noise phases, tails, masks, conversions, reductions.
#include "../cases.h"
#include "combine/combine_body.cuh"
#include "random/random_body.cuh"
#include "regression_loss/regression_loss_body.cuh"

namespace {

uint32_t naive_word(uint64_t seed, uint64_t stream, int64_t index) {
  const Words w = philox4x32(seed, static_cast<uint64_t>(index / 4), stream);
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  return words[index % 4];
}

double naive_normal(Dtype dtype, uint64_t seed, uint64_t stream, int64_t index) {
  const uint32_t a = naive_word(seed, stream, index / 2 * 2), b = naive_word(seed, stream, index / 2 * 2 + 1);
  if (dtype == Dtype::f64) {
    double z[2];
    box_muller(a, b, z[0], z[1]);
    return z[index % 2];
  }
  float z[2];
  box_muller(a, b, z[0], z[1]);
  return round_scalar(dtype, z[index % 2]);
}

// Coefficient tables, kept alive for a case.
struct Tables {
  bool wide;
  int64_t rows, sample_rows;
  std::vector<std::vector<double>> doubles;
  std::vector<std::vector<float>> floats;

  Coefficient make(bool positive = false) {
    const int64_t style = pick(0, 3);
    Coefficient c{};
    c.rows_per_entry = 1;
    if (style == 0 || coin()) c.value = static_cast<float>(positive ? 0.5 + std::fabs(normal()) : normal());
    if (coin()) c.slope = positive ? 0.5 : -1.5;
    if (style == 0) return c;
    c.rows_per_entry = style == 1 ? rows : style == 2 ? sample_rows : 1;
    c.stride = style == 1 ? 0 : pick(1, 3);
    const size_t size = static_cast<size_t>((rows / c.rows_per_entry - 1) * c.stride + 1);
    doubles.emplace_back(size);
    for (double& value : doubles.back()) value = static_cast<float>(positive ? std::fabs(normal()) : normal());
    floats.emplace_back(doubles.back().begin(), doubles.back().end());
    c.data = wide ? static_cast<const void*>(doubles.back().data()) : floats.back().data();
    return c;
  }
  // as the kernels round it: the product is not
  double value(const Coefficient& c, int64_t row) const {
    if (c.data == nullptr) return c.value;
    const int64_t entry = row / c.rows_per_entry * c.stride;
    const double x = wide ? static_cast<const double*>(c.data)[entry] : static_cast<const float*>(c.data)[entry];
    return std::fma(c.slope, x, c.value);
  }
};

// Operands of a call with their data, and what a plain loop makes of them.
struct Operands {
  Dtype dtype;
  int count;
  Tables tables;
  std::vector<Operand> operands;
  std::vector<Array> arrays, stores;
  int64_t seed = static_cast<int64_t>(generator());

  Operands(const Sizes& s, Dtype dtype_, int count_, int first_noise, bool wide, bool misaligned)
      : dtype(dtype_), count(count_), tables{wide, s.rows, s.sample_rows, {}, {}} {
    const bool any_noise = coin();
    for (int k = 0; k < count; ++k) {
      Operand operand{};
      arrays.push_back(random_tensor(s.elements, dtype, misaligned && coin()));
      stores.emplace_back();
      operand.data = arrays.back().data();
      if (k >= first_noise && any_noise && pick(0, 2) == 0) {
        operand.data = nullptr;
        operand.seed = &seed;
        operand.stream = pick(0, 5);
        operand.offset = coin() ? pick(0, 9) * 4 : (coin() ? pick(0, 9) : (int64_t{1} << 40) + pick(0, 9));
        if (coin()) stores.back() = Array(s.elements, bytes_of(dtype), misaligned && coin());
        operand.store = stores.back().data();
      }
      operand.coefficient = tables.make();
      operand.error = tables.make();
      operands.push_back(operand);
    }
  }

  double value(int k, int64_t i) const {
    const Operand& o = operands[static_cast<size_t>(k)];
    if (o.data != nullptr) return at(o.data, dtype, i);
    return naive_normal(dtype, static_cast<uint64_t>(seed), static_cast<uint64_t>(o.stream), o.offset + i);
  }
  // sum_k c_k k_k, and the sum of magnitudes, to which rounding is proportional.
  double sum(int64_t row, int64_t i, Coefficient Operand::* which, double& magnitude) const {
    double total = 0;
    magnitude = 0;
    for (int k = 0; k < count; ++k) {
      const double term = tables.value(operands[static_cast<size_t>(k)].*which, row) * value(k, i);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  }
  void check_stores(int64_t elements) const {
    for (int k = 0; k < count; ++k) {
      const Operand& o = operands[static_cast<size_t>(k)];
      for (int64_t i = 0; i < elements && o.store != nullptr; ++i)
        CHECK(same(at(o.store, dtype, i), value(k, i)), "stored noise %d at %lld", k, static_cast<long long>(i));
      CHECK(stores[static_cast<size_t>(k)].guarded(), "store %d", k);
    }
  }
};

inline void* moved(const void* data, int64_t bytes) {
  return data == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(data)) + bytes;
}

// A coefficient as rows from `row` on see it.
inline Coefficient from_row(Coefficient c, int64_t row, bool wide) {
  c.data = moved(c.data, row / c.rows_per_entry * c.stride * (wide ? 8 : 4));
  return c;
}

// An operand of one sample.
inline Operand from_row(Operand operand, int64_t row, int64_t inner, Dtype dtype, bool wide) {
  operand.data = moved(operand.data, row * inner * bytes_of(dtype));
  operand.store = nullptr;
  operand.offset += row * inner;
  operand.coefficient = from_row(operand.coefficient, row, wide);
  operand.error = from_row(operand.error, row, wide);
  return operand;
}

// A number of a sample depends neither on who else is in the batch nor on its place there.
void check_alone(const char* name, const void* batch, const void* alone, int64_t g, const Sizes& s, bool wide) {
  const Dtype kind = wide ? Dtype::f64 : Dtype::f32;
  CHECK(same(at(alone, kind, 0), at(batch, kind, g)), "%s of sample %lld of %lld, %lld elements: %.17g, alone %.17g",
        name, static_cast<long long>(g), static_cast<long long>(s.samples),
        static_cast<long long>(s.sample_rows * s.inner), at(batch, kind, g), at(alone, kind, 0));
}

void check_norm_alone(const CombineArguments& batch, const Sizes& s, bool wide) {
  const int64_t g = pick(0, s.samples - 1), row = g * s.sample_rows, elements = s.sample_rows * s.inner;
  CombineArguments a = batch;
  a.rows = s.sample_rows;
  a.samples = 1;
  for (int k = 0; k < a.count; ++k) a.operands[k] = from_row(batch.operands[k], row, s.inner, a.dtype, wide);
  const Array out(elements, bytes_of(a.dtype), false), norm(1, wide ? 8 : 4, false), scratch = workspace(elements, 1);
  a.out = out.data();
  a.norm = norm.data();
  a.workspace = scratch.data();
  CHECK(combine_cuda(a, nullptr) == Status::ok, "combine");
  check_alone("norm", batch.norm, a.norm, g, s, wide);
}

void check_loss_alone(const RegressionLossArguments& batch, const Sizes& s, bool wide) {
  const int64_t g = pick(0, s.samples - 1), row = g * s.sample_rows, elements = s.sample_rows * s.inner;
  RegressionLossArguments a = batch;
  a.rows = s.sample_rows;
  a.groups = 1;
  a.pred = moved(batch.pred, row * s.inner * bytes_of(a.pred_dtype));
  a.grad = nullptr;
  for (int k = 0; k < a.count; ++k) a.operands[k] = from_row(batch.operands[k], row, s.inner, a.dtype, wide);
  a.weight = from_row(batch.weight, row, wide);
  a.scale = from_row(batch.scale, row, wide);
  if (a.mask_elements > 0) a.mask = batch.mask + row * s.inner / a.mask_elements;
  const Array loss(1, wide ? 8 : 4, false), scratch = workspace(elements, 1);
  a.loss = loss.data();
  a.workspace = scratch.data();
  CHECK(regression_loss_cuda(a, nullptr) == Status::ok, "regression_loss");
  check_alone("loss", batch.loss, a.loss, g, s, wide);
}

void test_combine() {
  const Sizes s = Sizes::random();
  static const int counts[] = {1, 1, 2, 3, 4, 5, 8, 17};
  const Dtype dtype = dtypes[pick(0, 3)];
  const bool wide = dtype == Dtype::f64, with_norm = pick(0, 3) == 0, in_place = coin();
  Operands data(s, dtype, counts[pick(0, 7)], 1, wide, pick(0, 3) == 0);
  Array out(s.elements, bytes_of(dtype), pick(0, 5) == 0);
  CombineArguments a{};
  a.dtype = dtype;
  a.rows = s.rows;
  a.inner = s.inner;
  a.count = data.count;
  for (int k = 0; k < data.count; ++k) a.operands[k] = data.operands[static_cast<size_t>(k)];
  if (in_place && data.count == 1 && coin()) {  // rows that stay as they are
    Coefficient& c = data.operands[0].coefficient;
    for (auto& table : data.tables.floats)
      for (float& value : table) value = coin() ? 1.0f : value;
    for (size_t t = 0; t < data.tables.doubles.size(); ++t)
      data.tables.doubles[t].assign(data.tables.floats[t].begin(), data.tables.floats[t].end());
    c.slope = 1;
    c.value = c.data == nullptr ? 1 : 0;
    a.operands[0].coefficient = c;
  }
  std::vector<double> expected(static_cast<size_t>(s.elements)), tolerance(expected);
  std::vector<double> norms(static_cast<size_t>(s.samples)), slack(norms);
  a.has_error = coin();
  a.atol = 0.1;
  a.rtol = 0.05;
  for (int64_t i = 0; i < s.elements; ++i) {
    const int64_t row = i / s.inner;
    double magnitude;
    const double y = data.sum(row, i, &Operand::coefficient, magnitude);
    const double unit = wide ? 2e-15 : 1e-6;
    expected[static_cast<size_t>(i)] = y;
    tolerance[static_cast<size_t>(i)] =
        unit * magnitude + epsilon(dtype) * std::fabs(y) + (dtype == Dtype::f16 ? 6e-8 : 0);
    const double e = a.has_error ? data.sum(row, i, &Operand::error, magnitude) : y;
    const double bound = a.atol + a.rtol * std::fmax(std::fabs(data.value(0, i)), std::fabs(y));
    const double ratio = e / bound, off = unit * magnitude / bound;
    slack[static_cast<size_t>(i / (s.elements / s.samples))] += off * (2 * std::fabs(ratio) + off);
    norms[static_cast<size_t>(i / (s.elements / s.samples))] += ratio * ratio;
  }
  a.out = in_place ? const_cast<void*>(a.operands[0].data) : out.data();
  a.samples = s.samples;
  Array norm(s.samples, wide ? 8 : 4, false);
  a.norm = with_norm ? norm.data() : nullptr;

  const Array scratch = workspace(s.elements, s.samples);
  a.workspace = scratch.data();
  CHECK(combine_cuda(a, nullptr) == Status::ok, "combine");
  if (with_norm && !in_place) check_norm_alone(a, s, wide);

  for (int64_t i = 0; i < s.elements; ++i)
    CHECK(near(at(a.out, dtype, i), expected[static_cast<size_t>(i)], tolerance[static_cast<size_t>(i)]),
          "combine dtype %d count %d rows %lld inner %lld at %lld: %g, expected %g", static_cast<int>(dtype), a.count,
          static_cast<long long>(s.rows), static_cast<long long>(s.inner), static_cast<long long>(i),
          at(a.out, dtype, i), expected[static_cast<size_t>(i)]);
  for (int64_t g = 0; g < s.samples && with_norm; ++g) {
    const double size = static_cast<double>(s.elements / s.samples), sum = norms[static_cast<size_t>(g)];
    const double wanted = std::sqrt(sum / size), most = std::sqrt((sum + slack[static_cast<size_t>(g)]) / size);
    const double got = at(a.norm, wide ? Dtype::f64 : Dtype::f32, g);
    CHECK(near(got, wanted, most - wanted + (wide ? 1e-13 : 2e-5) * wanted), "norm %g, expected %g", got, wanted);
  }
  data.check_stores(s.elements);
  CHECK(out.guarded() && norm.guarded() && scratch.guarded() && data.arrays[0].guarded(), "combine");
}

void naive_penalty(Penalty kind, double d, double delta, double& value, double& derivative) {
  if (kind == Penalty::squared) penalty<Penalty::squared>(d, delta, value, derivative);
  if (kind == Penalty::huber) penalty<Penalty::huber>(d, delta, value, derivative);
  if (kind == Penalty::pseudo_huber) penalty<Penalty::pseudo_huber>(d, delta, value, derivative);
  if (kind == Penalty::l1) penalty<Penalty::l1>(d, delta, value, derivative);
}

void test_loss() {
  const Sizes s = Sizes::random();
  const Dtype dtype = dtypes[pick(0, 3)], pred_dtype = coin() ? dtype : dtypes[pick(0, 3)];
  const bool wide = dtype == Dtype::f64 || pred_dtype == Dtype::f64, misaligned = pick(0, 4) == 0;
  Operands data(s, dtype, static_cast<int>(pick(1, 3)), 0, wide, misaligned);
  Array pred = random_tensor(s.elements, pred_dtype, misaligned && coin());
  Array grad(s.elements, bytes_of(pred_dtype), misaligned && coin());
  RegressionLossArguments a{};
  a.pred_dtype = pred_dtype;
  a.pred = pred.data();
  a.grad = pick(0, 5) == 0 ? nullptr : grad.data();
  a.dtype = dtype;
  a.rows = s.rows;
  a.inner = s.inner;
  a.count = data.count;
  for (int k = 0; k < data.count; ++k) a.operands[k] = data.operands[static_cast<size_t>(k)];
  a.weight = data.tables.make(true);
  a.groups = coin() ? 1 : s.samples;
  // the scale of a group is that of its first row
  do a.scale = data.tables.make(true);
  while (a.scale.data != nullptr && a.scale.stride != 0 && (a.groups == 1 || a.scale.rows_per_entry != s.sample_rows));
  a.scale_grad = coin();
  a.kind = static_cast<Penalty>(pick(0, 3));
  a.delta = 0.75;
  const int64_t masks[] = {0, 1, s.inner, s.inner * s.sample_rows};
  a.mask_elements = masks[pick(0, 3)];
  Array mask(a.mask_elements == 0 ? 1 : s.elements / a.mask_elements, 1, misaligned && coin());
  if (a.mask_elements != 0) {
    a.mask = static_cast<const bool*>(mask.data());
    for (int64_t i = 0; i < s.elements / a.mask_elements; ++i) static_cast<bool*>(mask.data())[i] = pick(0, 3) != 0;
  }
  const auto kept = [&](int64_t i) { return a.mask == nullptr || a.mask[i / a.mask_elements]; };
  for (int64_t i = 0; i < s.elements; ++i)
    if (!kept(i) && coin()) store_scalar(pred.data(), pred_dtype, i, coin() ? std::nan("") : INFINITY);
  Array loss(a.groups, wide ? 8 : 4, false);
  a.loss = loss.data();

  const Array scratch = workspace(s.elements, a.groups);
  a.workspace = scratch.data();
  CHECK(regression_loss_cuda(a, nullptr) == Status::ok, "regression_loss");
  if (a.groups == s.samples) check_loss_alone(a, s, wide);

  std::vector<double> sums(static_cast<size_t>(a.groups)), slack(sums);
  for (int64_t i = 0; i < s.elements; ++i) {
    const int64_t row = i / s.inner;
    double magnitude, value = 0, derivative = 0;
    const double d = at(a.pred, pred_dtype, i) - data.sum(row, i, &Operand::coefficient, magnitude);
    naive_penalty(a.kind, d, a.delta, value, derivative);
    const double w = data.tables.value(a.weight, row), scale = data.tables.value(a.scale, row);
    const size_t group = static_cast<size_t>(i / (s.elements / a.groups));
    const double unit = (wide ? 2e-15 : 1e-6) * (magnitude + std::fabs(d));
    if (kept(i)) {
      sums[group] += w * value * scale;
      slack[group] += std::fabs(w * scale) * ((wide ? 1e-13 : 1e-5) * value + unit * (std::fabs(derivative) + unit));
    }
    if (a.grad == nullptr) continue;
    if (kept(i) && a.kind == Penalty::l1 && std::fabs(d) <= unit) continue;  // the sign is open
    const double factor = w * (a.scale_grad ? scale : 1);
    const double expected = kept(i) ? factor * derivative : 0, got = at(a.grad, pred_dtype, i);
    const double tolerance = 2 * factor * unit + (epsilon(pred_dtype) + (wide ? 0 : 1e-6)) * std::fabs(expected) +
                             (pred_dtype == Dtype::f16 ? 6e-8 : 0);
    CHECK(kept(i) ? near(got, expected, tolerance) : got == 0,
          "gradient dtypes %d %d kind %d rows %lld inner %lld groups %lld at %lld: %g, expected %g",
          static_cast<int>(pred_dtype), static_cast<int>(dtype), static_cast<int>(a.kind),
          static_cast<long long>(s.rows), static_cast<long long>(s.inner), static_cast<long long>(a.groups),
          static_cast<long long>(i), got, expected);
  }
  for (int64_t g = 0; g < a.groups; ++g) {
    const double got = at(a.loss, wide ? Dtype::f64 : Dtype::f32, g), wanted = sums[static_cast<size_t>(g)];
    CHECK(near(got, wanted, slack[static_cast<size_t>(g)]), "loss %g, expected %g", got, wanted);
  }
  data.check_stores(s.elements);
  CHECK(grad.guarded() && loss.guarded() && scratch.guarded(), "loss");
}

void test_random() {
  RandomArguments a{};
  a.kind = static_cast<RandomKind>(pick(0, 2));
  a.dtype = dtypes[pick(0, 3)];
  a.count = pick(0, 2) == 0 ? pick(1, 20) : pick(1, 20000);
  const bool words = a.kind == RandomKind::words;
  Array out(a.count, words ? 8 : bytes_of(a.dtype), pick(0, 3) == 0);
  const int64_t seed = static_cast<int64_t>(generator());
  a.out = out.data();
  a.seed = &seed;
  a.stream = pick(0, 3) == 0 ? int64_t{1} << 40 : pick(0, 3);
  a.offset = pick(0, 3) == 0 ? (int64_t{1} << 35) + pick(0, 9) : pick(0, 9);
  CHECK(random_cuda(a, nullptr) == Status::ok, "random");
  const uint64_t key = static_cast<uint64_t>(seed), stream = static_cast<uint64_t>(a.stream);
  for (int64_t i = 0; i < a.count; ++i) {
    const uint32_t word = naive_word(key, stream, a.offset + i);
    if (words) {
      CHECK(static_cast<const int64_t*>(a.out)[i] == static_cast<int64_t>(word), "word %lld",
            static_cast<long long>(i));
      continue;
    }
    const int bits = a.dtype == Dtype::f64 ? 32 : a.dtype == Dtype::f32 ? 24 : a.dtype == Dtype::f16 ? 11 : 8;
    const double expected = a.kind == RandomKind::normal ? naive_normal(a.dtype, key, stream, a.offset + i)
                                                         : std::ldexp(static_cast<double>(word >> (32 - bits)), -bits);
    CHECK(at(a.out, a.dtype, i) == expected, "kind %d dtype %d offset %lld at %lld", static_cast<int>(a.kind),
          static_cast<int>(a.dtype), static_cast<long long>(a.offset), static_cast<long long>(i));
  }
  CHECK(out.guarded(), "random");
}

void test_divider() {
  for (int round = 0; round < 200000; ++round) {
    const int64_t d = 1 + static_cast<int64_t>(generator() >> pick(1, 63));
    int64_t n = static_cast<int64_t>(generator() >> pick(1, 63));
    if (coin() && n > 0) n = n / d * d - pick(0, 1);  // where a quotient changes
    if (n < 0 || d <= 0) continue;
    CHECK(make_divider(d).divide(n) == n / d, "%lld / %lld", static_cast<long long>(n), static_cast<long long>(d));
  }
}

// Blocks take every element once, in order, and none of another group; also beyond 2^31 elements.
void test_partition() {
  for (int round = 0; round < 300; ++round) {
    const int64_t group_elements = pick(1, 3) == 1 ? pick(1, 3000) : int64_t{1} << pick(0, 34);
    const int64_t groups =
        coin() ? 1 : pick(1, std::min<int64_t>(200000, std::max<int64_t>(2, (int64_t{1} << 36) / group_elements)));
    const Partition p = make_partition(group_elements * groups, groups);
    int64_t next = 0;
    const int64_t stride = std::max<int64_t>(1, p.blocks / 20000);
    for (int64_t b = 0; b < p.blocks; ++b) {
      if (stride > 1 && b % stride > 1 && b + 1 < p.blocks) continue;
      int64_t begin, end;
      p.range(b, begin, end);
      if (stride > 1 && (b % stride == 0 || b + 1 == p.blocks)) next = std::max(next, begin);
      if (begin >= end) continue;
      CHECK(begin == next && end <= p.elements, "block %lld begins at %lld, expected %lld", static_cast<long long>(b),
            static_cast<long long>(begin), static_cast<long long>(next));
      if (p.block_groups == 0)
        CHECK(begin / group_elements == b / p.parts && (end - 1) / group_elements == b / p.parts, "group");
      else
        CHECK(end - begin <= part_unit && begin % group_elements == 0 && end % group_elements == 0, "groups");
      next = end;
    }
    CHECK(next == p.elements, "%lld of %lld", static_cast<long long>(next), static_cast<long long>(p.elements));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  test_divider();
  test_partition();
  for (int round = 0; round < rounds; ++round) {
    test_combine();
    test_loss();
    test_random();
  }
  return verdict(rounds);
}
