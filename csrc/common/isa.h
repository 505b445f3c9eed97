// The CPU kernels exist once for each instruction set; the one to run is chosen on first use.
#pragma once

#include "../combine/combine.h"
#include "../random/random.h"
#include "../regression_loss/regression_loss.h"
#include "../row_dots/row_dots.h"

namespace fm {

#define FM_DECLARE_ISA(isa)                               \
  namespace isa {                                         \
  Status combine(const CombineArguments&);                \
  Status regression_loss(const RegressionLossArguments&); \
  Status random(const RandomArguments&);                  \
  Status row_dots(const RowDotsArguments&);               \
  }
FM_DECLARE_ISA(baseline)
#if defined(FM_HAS_X86_VARIANTS)
FM_DECLARE_ISA(avx2)
FM_DECLARE_ISA(avx512)
#endif
#undef FM_DECLARE_ISA

// "avx512", "avx2" or "baseline" (SSE2 on x86-64, NEON on aarch64). FMKERNELS_ISA caps it.
const char* isa_name();

}  // namespace fm
