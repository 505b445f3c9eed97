// The normals of a GPU (common/normal.h), with hardware functions as wrong as they may be, against double precision and
// against the CPU's formula. Compiled as the emulated kernels are: with the device's fused operations.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/normal.h"
#include "common/philox.h"

namespace {

using namespace fm;

int failures = 0;

void expect(bool ok, const char* what, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: got %.9g, expected %.9g\n", what, got, want);
}

// What documents promise of the two instructions. Both: log2 is off by 2^-22 at most for arguments in (1/2, 2). Else
// the CUDA programming guide, of __log2f and of sqrtf with -prec-sqrt=false, from tests: 2 ulp and 1 ulp; the PTX ISA,
// of lg2.approx and sqrt.approx: 2^-22 and 2^-23 of the value.
enum class Document { guide, ptx };

// A GPU's functions as wrong as a document lets them be, towards one side.
template <Document document, int log_side, int root_side>
struct Erring {
  static double ulp(double x) { return std::ldexp(1.0, std::ilogb(x) - 23); }
  // The float next to exact + side * error on the inner side: what is documented holds after rounding.
  static float off(double exact, int side, double error) {
    const float y = static_cast<float>(exact + side * error);
    return std::fabs(y - exact) <= error ? y : std::nextafter(y, static_cast<float>(exact));
  }
  static float log2(float x) {
    const double exact = std::log2(static_cast<double>(x));
    const double relative = document == Document::ptx ? 0x1p-22 * std::fabs(exact) : 2 * ulp(exact);
    return off(exact, log_side, x > 0.5f && x < 2.0f ? 0x1p-22 : relative);
  }
  static float square_root(float x) {
    if (!(x > 0)) return x == 0 ? x : NAN;
    const double exact = std::sqrt(static_cast<double>(x));
    return off(exact, root_side, document == Document::ptx ? 0x1p-23 * exact : ulp(exact));
  }
};

template <Document document, int log_side, int root_side>
void test_normals(double most) {
  double worst = 0, worst_cpu = 0;
  const auto compare = [&](uint32_t a, uint32_t b) {
    float z[2], cosine, sine;
    const float u = open_uniform(a), v = open_uniform(b);
    approximate_normals<Erring<document, log_side, root_side>>(u, v, z[0], z[1]);
    const double r = std::sqrt(-2 * std::log(static_cast<double>(u))), angle = 6.283185307179586 * v;
    const double exact[2] = {r * std::cos(angle), r * std::sin(angle)};
    const float radius = std::sqrt(-2.0f * log_positive(u));
    cos_sin_turns(v, cosine, sine);
    const float cpu[2] = {radius * cosine, radius * sine};
    for (int k = 0; k < 2; ++k) {
      worst = std::fmax(worst, std::isfinite(z[k]) ? std::fabs(z[k] - exact[k]) : INFINITY);
      worst_cpu = std::fmax(worst_cpu, std::fabs(z[k] - cpu[k]));
    }
  };
  std::vector<uint32_t> radii, angles;
  for (uint32_t i = 0; i < 700; ++i) {
    radii.push_back(i);                                                   // the largest
    radii.push_back(~i);                                                  // next to 1
    radii.push_back(0xF8000000u + 64 * (i - 350u));                       // the series' end
    radii.push_back(0x80000000u + 64 * (i - 350u));                       // log2's bound changes
    radii.push_back(static_cast<uint32_t>(std::exp2(32.0 * i / 700.0)));  // every size
    radii.push_back(~static_cast<uint32_t>(std::exp2(32.0 * i / 700.0)));
  }
  for (uint32_t eighth = 0; eighth < 8; ++eighth)
    for (uint32_t i = 0; i < 20; ++i) {
      const uint32_t away = i == 0 ? 0 : 1u << i;
      angles.push_back((eighth << 29) + away);
      angles.push_back((eighth << 29) - away);
      angles.push_back((eighth << 29) + i * 0x01999999u);
    }
  for (const uint32_t a : radii)
    for (const uint32_t b : angles) compare(a, b);
  for (uint32_t i = 0; i < 200000; ++i) {
    const Words w = philox4x32(11, i, 5);
    compare(w.w0, w.w1);
  }
  expect(worst < most, "a GPU's float normals, at worst, against double", worst, most);
  expect(worst_cpu < most, "a GPU's float normals, at worst, against the CPU's", worst_cpu, most);
  std::printf("a GPU's normals, %s, functions erring by %+d and %+d: %.2e from double, %.2e from the CPU's\n",
              document == Document::ptx ? "PTX" : "guide", log_side, root_side, worst, worst_cpu);
}

template <Document document>
void test_document(double most) {
  test_normals<document, -1, -1>(most);
  test_normals<document, -1, 1>(most);
  test_normals<document, 0, 0>(most);
  test_normals<document, 1, -1>(most);
  test_normals<document, 1, 1>(most);
}

}  // namespace

int main() {
  test_document<Document::guide>(2e-6);
  test_document<Document::ptx>(2.5e-6);
  return failures == 0 ? 0 : 1;
}
