// Instruction sets of the CPU kernels, chosen when the kernel runs: a wheel built anywhere is fast
// everywhere. A kernel writes its loops in a header without an include guard, which each_isa.h
// includes once for each instruction set between the macros below, in a namespace of that name,
// with FASTFREEZE_ISA_LEVEL defined as the value of the Isa.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTFREEZE_X86 1
#include <immintrin.h>
#else
#define FASTFREEZE_X86 0
#endif

// clang-format off
#if FASTFREEZE_X86 && defined(__clang__)
#define FASTFREEZE_AVX2_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define FASTFREEZE_AVX512_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), apply_to = function)")
#define FASTFREEZE_TARGET_END _Pragma("clang attribute pop")
#elif FASTFREEZE_X86
#define FASTFREEZE_AVX2_BEGIN \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define FASTFREEZE_AVX512_BEGIN \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512\")")
#define FASTFREEZE_TARGET_END _Pragma("GCC pop_options")
#endif

// The function of that name that was compiled for an instruction set.
#if FASTFREEZE_X86
#define FASTFREEZE_OF_ISA(isa, function)               \
  ((isa) == Isa::avx512 ? avx512::function             \
   : (isa) == Isa::avx2 ? avx2::function : baseline::function)
#else
#define FASTFREEZE_OF_ISA(isa, function) baseline::function
#endif
// clang-format on

namespace fastfreeze {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best of this machine, unless the operator cpu_isa (for tests) has chosen a lesser one.
Isa current_isa();

}  // namespace fastfreeze
