#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fm {
namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect() {
  Isa best = Isa::baseline;
#if defined(FM_HAS_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
  }
  const char* cap = std::getenv("FMKERNELS_ISA");
  if (cap != nullptr && std::strcmp(cap, "baseline") == 0) best = Isa::baseline;
  if (cap != nullptr && std::strcmp(cap, "avx2") == 0 && best == Isa::avx512) best = Isa::avx2;
#endif
  return best;
}

Isa chosen() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace

const char* isa_name() {
  switch (chosen()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

#if defined(FM_HAS_X86_VARIANTS)
#define FM_RUN(op, arguments)         \
  switch (chosen()) {                 \
    case Isa::avx512:                 \
      return avx512::op(arguments);   \
    case Isa::avx2:                   \
      return avx2::op(arguments);     \
    default:                          \
      return baseline::op(arguments); \
  }
#else
#define FM_RUN(op, arguments) return baseline::op(arguments);
#endif

Status combine_cpu(const CombineArguments& arguments){FM_RUN(combine, arguments)} Status
    regression_loss_cpu(const RegressionLossArguments& arguments){FM_RUN(regression_loss, arguments)} Status
    random_cpu(const RandomArguments& arguments){FM_RUN(random, arguments)} Status
    row_dots_cpu(const RowDotsArguments& arguments) {
  FM_RUN(row_dots, arguments)
}

}  // namespace fm
