// The operator cpu_isa(level): tells which instruction set the kernels use, and, for level >= 0,
// makes them use another one that the machine has. Levels are the values of Isa.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace fastfreeze {
namespace {

Isa best_isa() {
#if FASTFREEZE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

int64_t cpu_isa(int64_t level) {
  if (level >= 0) {
    STD_TORCH_CHECK(level <= static_cast<int64_t>(best_isa()), "instruction set level ", level,
                    " is not one this machine has; the best is ", static_cast<int64_t>(best_isa()));
    isa_in_use() = static_cast<Isa>(level);
  }
  return static_cast<int64_t>(isa_in_use().load());
}

}  // namespace

Isa current_isa() { return isa_in_use(); }

}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastfreeze::cpu_isa));
}
