// The SGD kernels, launched as csrc/cuda/fused_sgd_kernel.cu launches them.
// clang-format off
#include "cuda_emulation.h"  // before what it emulates
// clang-format on

#include <algorithm>

#include "cuda/fused_sgd.cuh"
#include "harness.h"

using namespace fastfreeze;

namespace {

// Buffers 0..6, the tables of DevicePlan. Scalars: 0 run_elements, 1 eta_min, 2 warmup_steps.
SgdTables tables_of(const emulation::Arguments& args) {
  int64_t* counters = args.buffer<int64_t>(6);
  return {
      args.buffer<const SgdRun>(0),
      args.buffer<const double>(1),
      {args.buffer<const Segment>(2), args.buffer<const int64_t>(3), args.real(1), args.real(2)},
      args.buffer<const int32_t>(4),
      args.buffer<uint8_t>(5),
      counters,
      reinterpret_cast<unsigned*>(counters + 1),
      args.count<SgdRun>(0),
      static_cast<int32_t>(args.integer(0)),
      static_cast<int32_t>(args.count<uint8_t>(5))};
}

template <typename P, typename M>
void launch(const emulation::Arguments& args, bool track, bool in_arguments) {
  const SgdTables tables = tables_of(args);
  const SgdCall call{args.buffer<const float>(8), args.buffer<const float>(9), track};
  const int64_t blocks = (tables.num_runs + kSgdThreads / 32 - 1) / (kSgdThreads / 32);
  const int64_t grid = std::max<int64_t>(1, blocks);
  const auto* grads = args.buffer<const int64_t>(7);
  if (in_arguments) {
    GradArguments arguments{};
    std::copy_n(grads, tables.num_tensors, arguments.address);
    emulation::emulate(grid, 1, kSgdThreads, args.seed, sgd_kernel<P, M, GradArguments>, tables,
                       arguments, call);
  } else {
    emulation::emulate(grid, 1, kSgdThreads, args.seed, sgd_kernel<P, M, GradTable>, tables,
                       GradTable{grads}, call);
  }
}

}  // namespace

// Buffer 7, the gradients' addresses; 8 found_inf; 9 grad_scale. Scalars: 3 the parameters' dtype,
// 4 whether their momentum is wide, 5 track, 6 whether the addresses travel as arguments.
EMULATED(sgd_step) {
  const bool track = args.integer(5) != 0, in_arguments = args.integer(6) != 0;
  emulation::with_type(args.integer(3), [&](auto zero) {
    using P = decltype(zero);
    if (args.integer(4) == 0) return launch<P, P>(args, track, in_arguments);
    if constexpr (sizeof(P) == 2) return launch<P, float>(args, track, in_arguments);
    throw std::runtime_error("wide momentum is for 16-bit parameters");
  });
}
