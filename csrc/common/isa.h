// CPU kernels exist once for each instruction set; the one to run is chosen on first use.
//
// A <op>_cpu.cpp defines fm::FM_ISA::<op> and ends with FM_ENTRY_POINTS(<op>, <arguments>), which defines the rest of
// the operation's contract: <op>_cpu, and <op>_cuda where the library is built without CUDA.
#pragma once

#include "status.h"

namespace fm {

enum class Isa { baseline, avx2, avx512 };

// FMKERNELS_ISA caps it.
Isa chosen_isa();

// "avx512", "avx2" or "baseline" (SSE2 on x86-64, NEON on aarch64).
const char* isa_name();

}  // namespace fm

// The copies that there are; FM_HAS_AVX2 and FM_HAS_AVX512 come from CMake.
#if defined(FM_HAS_AVX2)
#define FM_DECLARE_AVX2(op, Arguments) \
  namespace avx2 {                     \
  Status op(const Arguments&);         \
  }
#define FM_RUN_AVX2(op) \
  if (chosen_isa() == Isa::avx2) return avx2::op(arguments);
#else
#define FM_DECLARE_AVX2(op, Arguments)
#define FM_RUN_AVX2(op)
#endif
#if defined(FM_HAS_AVX512)
#define FM_DECLARE_AVX512(op, Arguments) \
  namespace avx512 {                     \
  Status op(const Arguments&);           \
  }
#define FM_RUN_AVX512(op) \
  if (chosen_isa() == Isa::avx512) return avx512::op(arguments);
#else
#define FM_DECLARE_AVX512(op, Arguments)
#define FM_RUN_AVX512(op)
#endif

// Inside namespace fm.
#define FM_DECLARE_VARIANTS(op, Arguments) \
  namespace baseline {                     \
  Status op(const Arguments&);             \
  }                                        \
  FM_DECLARE_AVX2(op, Arguments)           \
  FM_DECLARE_AVX512(op, Arguments)

#if defined(FM_HAS_CUDA)
#define FM_NO_CUDA_ENTRY(entry, Arguments)
#else
#define FM_NO_CUDA_ENTRY(entry, Arguments)                          \
  namespace fm {                                                    \
  Status entry(const Arguments&, void*) { return Status::no_cuda; } \
  }
#endif

// The entry points belong to the copy that every processor can run.
#if defined(FM_IS_BASELINE)
#define FM_ENTRY_POINTS(op, Arguments)          \
  namespace fm {                                \
  FM_DECLARE_VARIANTS(op, Arguments)            \
  Status op##_cpu(const Arguments& arguments) { \
    FM_RUN_AVX512(op)                           \
    FM_RUN_AVX2(op)                             \
    return baseline::op(arguments);             \
  }                                             \
  }                                             \
  FM_NO_CUDA_ENTRY(op##_cuda, Arguments)
#else
#define FM_ENTRY_POINTS(op, Arguments)
#endif
