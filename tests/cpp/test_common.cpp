// The shared math against double precision and known answers, and the CPU kernels of every instruction set that this
// machine has against each other.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "combine/combine.h"
#include "common/float16.h"
#include "common/isa.h"
#include "common/normal.h"
#include "common/philox.h"
#include "regression_loss/penalty.h"

namespace fm {
FM_DECLARE_VARIANTS(combine, CombineArguments)
}

namespace {

int failures = 0;

void expect(bool ok, const char* what, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: got %.9g, expected %.9g\n", what, got, want);
}

void test_philox() {
  // Random123's known answers for philox4x32-10
  const fm::Words zero = fm::philox4x32(0, 0, 0);
  expect(zero.w0 == 0x6627e8d5u && zero.w1 == 0xe169c58du && zero.w2 == 0xbc57ac4cu && zero.w3 == 0x9b00dbd8u,
         "philox of zeros", zero.w0, 0x6627e8d5u);
  const fm::Words ones = fm::philox4x32(~0ull, ~0ull, ~0ull);
  expect(ones.w0 == 0x408f276du && ones.w1 == 0x41c83b0eu && ones.w2 == 0xa20bc7c6u && ones.w3 == 0x6d5451fdu,
         "philox of ones", ones.w0, 0x408f276du);
  const fm::Words pi = fm::philox4x32(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull);
  expect(pi.w0 == 0xd16cfe09u && pi.w1 == 0x94fdccebu && pi.w2 == 0x5001e420u && pi.w3 == 0x24126ea1u, "philox of pi",
         pi.w0, 0xd16cfe09u);
}

void test_log_and_angles() {
  double worst_log = 0, worst_angle = 0;
  for (uint64_t i = 0; i < (1ull << 32); i += 4099) {
    const float u = fm::open_uniform(static_cast<uint32_t>(i));
    expect(u > 0 && u <= 1, "open_uniform in (0, 1]", u, 1);
    const double want = std::log(static_cast<double>(u));
    const double error = std::fabs(fm::log_positive(u) - want) / std::fmax(std::fabs(want), 1e-30);
    if (want != 0) worst_log = std::fmax(worst_log, error);
    float c, s;
    fm::cos_sin_turns(u, c, s);
    const double angle = 6.283185307179586 * static_cast<double>(u);
    worst_angle = std::fmax(worst_angle, std::fmax(std::fabs(c - std::cos(angle)), std::fabs(s - std::sin(angle))));
  }
  expect(worst_log < 2.5e-7, "relative error of log", worst_log, 2.5e-7);
  expect(worst_angle < 1.5e-7, "absolute error of cos and sin", worst_angle, 1.5e-7);
  expect(fm::log_positive(1.0f) == 0.0f, "log 1", fm::log_positive(1.0f), 0);
  expect(fm::open_uniform(0) == 0x1p-33f, "smallest uniform", fm::open_uniform(0), 0x1p-33);
  expect(fm::open_uniform(~0u) == 1.0f, "largest uniform", fm::open_uniform(~0u), 1);
  expect(fm::half_open_uniform(~0u, 24) < 1.0f, "largest half-open uniform", fm::half_open_uniform(~0u, 24), 1);
  double worst_normal = 0;
  for (uint32_t i = 0; i < 1000000; ++i) {
    const fm::Words w = fm::philox4x32(7, i, 3);
    float z0, z1;
    double d0, d1;
    fm::box_muller(w.w0, w.w1, z0, z1);
    fm::box_muller(w.w0, w.w1, d0, d1);
    worst_normal = std::fmax(worst_normal, std::fmax(std::fabs(z0 - d0), std::fabs(z1 - d1)));
  }
  expect(worst_normal < 2e-6, "float normals against double", worst_normal, 2e-6);
}

// Rounds to a format with the given significand bits and exponent range by exact arithmetic in double.
double rounded(double x, int bits, int smallest) {
  if (x == 0 || !std::isfinite(x)) return x;
  int e;
  std::frexp(x, &e);
  const double unit = std::ldexp(1.0, (e - bits < smallest ? smallest : e - bits));
  return std::nearbyint(x / unit) * unit;
}

void test_half_formats() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = fm::f16_to_float(static_cast<uint16_t>(h));
    const float b = fm::bf16_to_float(static_cast<uint16_t>(h));
    if (std::isnan(f)) {
      expect((fm::float_to_f16(f) & 0x7FFFu) > 0x7C00u, "f16 NaN stays NaN", h, h);
    } else {
      expect(fm::float_to_f16(f) == h, "f16 round trip", fm::float_to_f16(f), h);
    }
    if (std::isnan(b)) {
      expect((fm::float_to_bf16(b) & 0x7FFFu) > 0x7F80u, "bf16 NaN stays NaN", h, h);
    } else {
      expect(fm::float_to_bf16(b) == h, "bf16 round trip", fm::float_to_bf16(b), h);
    }
  }
  for (uint64_t i = 0; i < (1ull << 32); i += 65521) {
    const float x = fm::bits_to_float(static_cast<uint32_t>(i));
    if (!std::isfinite(x)) continue;
    double f16 = rounded(x, 11, -24);
    if (std::fabs(f16) > 65504.0) f16 = std::copysign(std::numeric_limits<double>::infinity(), x);
    const double got = fm::f16_to_float(fm::float_to_f16(x));
    expect(got == f16, "float to f16", got, f16);
    const double bf16 = static_cast<float>(rounded(x, 8, -133));
    const double got_b = fm::bf16_to_float(fm::float_to_bf16(x));
    expect(got_b == bf16 || std::fabs(x) > 3.38e38f, "float to bf16", got_b, bf16);
  }
  expect(fm::float_to_f16(65519.996f) == 0x7BFFu, "just below the f16 limit", fm::float_to_f16(65519.996f), 0x7BFF);
  expect(fm::float_to_f16(65520.0f) == 0x7C00u, "the f16 limit", fm::float_to_f16(65520.0f), 0x7C00);
}

template <fm::Penalty kind>
void test_penalty(const char* name) {
  const double delta = 0.7, h = 1e-6;
  for (double d = -3; d <= 3; d += 0.0937) {
    double value, slope, low, high, unused;
    fm::penalty<kind>(d, delta, value, slope);
    fm::penalty<kind>(d - h, delta, low, unused);
    fm::penalty<kind>(d + h, delta, high, unused);
    expect(value >= 0, name, value, 0);
    expect(std::fabs((high - low) / (2 * h) - slope) < 1e-5, name, slope, (high - low) / (2 * h));
  }
  double value, slope;
  fm::penalty<kind>(0.0, delta, value, slope);
  expect(value == 0 && slope == 0, name, value, 0);
  fm::penalty<kind>(std::nan(""), delta, value, slope);
  expect(std::isnan(value) && std::isnan(slope), "NaN is kept", value, value);
  for (double sign : {-1.0, 1.0}) {
    double far;
    fm::penalty<kind>(sign * 1e300, delta, value, far);
    fm::penalty<kind>(sign * HUGE_VAL, delta, value, slope);
    expect(value == HUGE_VAL, name, value, HUGE_VAL);
    expect(slope == far || kind == fm::Penalty::squared, name, slope, far);
  }
}

template <typename Run>
void test_variant(Run combine, Run reference, const char* name) {
  const int64_t rows = 5, inner = 333;
  std::vector<float> a(rows * inner), b(rows * inner), y(rows * inner), want(rows * inner), c(rows);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = std::sin(0.37f * static_cast<float>(i));
    b[i] = std::cos(0.11f * static_cast<float>(i));
  }
  for (int64_t r = 0; r < rows; ++r) c[r] = 0.1f * static_cast<float>(r + 1);
  int64_t seed = 42;
  fm::CombineArguments args{};
  args.dtype = fm::Dtype::f32;
  args.rows = rows;
  args.inner = inner;
  args.count = 3;
  args.samples = 1;
  args.operands[0].data = a.data();
  args.operands[0].coefficient = {c.data(), 1, 1, 0.0};
  args.operands[1].data = b.data();
  args.operands[1].coefficient = {c.data(), 1, 1, 1.0, -1.0};  // 1 - c
  args.operands[2].seed = &seed;
  args.operands[2].offset = 3;
  args.operands[2].coefficient = {nullptr, 1, 0, 0.5};
  args.out = want.data();
  reference(args);
  args.out = y.data();
  combine(args);
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / inner;
    const fm::Words w = fm::philox4x32(42, (i + 3) / 4, 0);
    const uint32_t words[] = {w.w0, w.w1, w.w2, w.w3};
    const int lane = static_cast<int>((i + 3) % 4);
    double z[2];
    fm::box_muller(words[lane & ~1], words[lane | 1], z[0], z[1]);
    const double exact = c[row] * a[i] + (1.0 - c[row]) * b[i] + 0.5 * z[lane & 1];
    expect(std::fabs(y[i] - exact) < 3e-6, name, y[i], exact);
    expect(std::fabs(y[i] - want[i]) < 3e-6, name, y[i], want[i]);
  }
}

}  // namespace

int main() {
  test_philox();
  test_log_and_angles();
  test_half_formats();
  test_penalty<fm::Penalty::squared>("squared");
  test_penalty<fm::Penalty::huber>("huber");
  test_penalty<fm::Penalty::pseudo_huber>("pseudo_huber");
  test_penalty<fm::Penalty::l1>("l1");
  using Run = fm::Status (*)(const fm::CombineArguments&);
  test_variant<Run>(fm::baseline::combine, fm::baseline::combine, "baseline");
#if defined(FM_HAS_AVX2)
  if (fm::chosen_isa() != fm::Isa::baseline) test_variant<Run>(fm::avx2::combine, fm::baseline::combine, "avx2");
#endif
#if defined(FM_HAS_AVX512)
  if (fm::chosen_isa() == fm::Isa::avx512) test_variant<Run>(fm::avx512::combine, fm::baseline::combine, "avx512");
#endif
  std::printf(failures == 0 ? "all passed (%s)\n" : "failures with %s\n", fm::isa_name());
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
