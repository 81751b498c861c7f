// The kernels of steps, launched as csrc/cuda/step_kernel.cu launches them.
// clang-format off
#include "cuda_emulation.h"  // before what it emulates
// clang-format on

#include <algorithm>

#include "cuda/fused_adam.cuh"
#include "cuda/fused_sgd.cuh"
#include "harness.h"

using namespace fastfreeze;

namespace {

// Buffers 0..6, the tables of DevicePlan. Scalars: 0 run_elements, 1 eta_min, 2 warmup_steps.
template <typename Tables>
Tables tables_of(const emulation::Arguments& args) {
  using Row = Run<Tables::kStates>;
  using Progress = typename Tables::Progress;
  int64_t* counters = args.buffer<int64_t>(6);
  return {
      args.buffer<const Row>(0),
      args.buffer<const double>(1),
      {args.buffer<const Segment>(2), args.buffer<const int64_t>(3), args.real(1), args.real(2)},
      args.buffer<const int32_t>(4),
      args.buffer<Progress>(5),
      counters,
      reinterpret_cast<unsigned*>(counters + 1),
      args.count<Row>(0),
      static_cast<int32_t>(args.integer(0)),
      static_cast<int32_t>(args.count<Progress>(5))};
}

template <typename Rule>
void launch(const emulation::Arguments& args) {
  const bool track = args.integer(5) != 0, in_arguments = args.integer(6) != 0;
  const auto tables = tables_of<typename Rule::Tables>(args);
  const StepCall call{args.buffer<const float>(8), args.buffer<const float>(9), track};
  const int64_t blocks = (tables.num_runs + kStepThreads / 32 - 1) / (kStepThreads / 32);
  const int64_t grid = std::max<int64_t>(1, blocks);
  const auto* grads = args.buffer<const int64_t>(7);
  if (in_arguments) {
    GradArguments arguments{};
    std::copy_n(grads, tables.num_tensors, arguments.address);
    emulation::emulate(grid, 1, kStepThreads, args.seed, step_kernel<Rule, GradArguments>, tables,
                       arguments, call);
  } else {
    emulation::emulate(grid, 1, kStepThreads, args.seed, step_kernel<Rule, GradTable>, tables,
                       GradTable{grads}, call);
  }
}

template <template <typename P, typename M> class Rule>
void launch_typed(const emulation::Arguments& args) {
  emulation::with_type(args.integer(3), [&](auto zero) {
    using P = decltype(zero);
    if (args.integer(4) == 0) return launch<Rule<P, P>>(args);
    if constexpr (sizeof(P) == 2) return launch<Rule<P, float>>(args);
    throw std::runtime_error("a wide state is for 16-bit parameters");
  });
}

}  // namespace

// Buffer 7, the gradients' addresses; 8 found_inf; 9 grad_scale. Scalars: 3 the parameters' dtype,
// 4 whether their state is wide, 5 track, 6 whether the addresses travel as arguments.
EMULATED(sgd_step) { launch_typed<SgdRule>(args); }
EMULATED(adam_step) { launch_typed<AdamRule>(args); }
