#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fm {
namespace {

Isa detect() {
  Isa best = Isa::baseline;
#if defined(FM_HAS_AVX2) || defined(FM_HAS_AVX512)
  const auto capped_at = [](const char* name) {
    const char* cap = std::getenv("FMKERNELS_ISA");
    return cap != nullptr && std::strcmp(cap, name) == 0;
  };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(FM_HAS_AVX2)
  if (avx2 && !capped_at("baseline")) best = Isa::avx2;
#endif
#if defined(FM_HAS_AVX512)
  if (avx2 && !capped_at("baseline") && !capped_at("avx2") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
#endif
  return best;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name() {
  switch (chosen_isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fm
