// Includes the header that FASTFREEZE_LOOPS names once for each instruction set (isa.h). Without an
// include guard: each kernel does so once.

namespace baseline {
#define FASTFREEZE_ISA_LEVEL 0
#include FASTFREEZE_LOOPS
#undef FASTFREEZE_ISA_LEVEL
}  // namespace baseline

#if FASTFREEZE_X86
FASTFREEZE_AVX2_BEGIN
namespace avx2 {
#define FASTFREEZE_ISA_LEVEL 1
#include FASTFREEZE_LOOPS
#undef FASTFREEZE_ISA_LEVEL
}  // namespace avx2
FASTFREEZE_TARGET_END

FASTFREEZE_AVX512_BEGIN
namespace avx512 {
#define FASTFREEZE_ISA_LEVEL 2
#include FASTFREEZE_LOOPS
#undef FASTFREEZE_ISA_LEVEL
}  // namespace avx512
FASTFREEZE_TARGET_END
#endif

#undef FASTFREEZE_LOOPS
