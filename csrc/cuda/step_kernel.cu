// The host's side of a step on a CUDA device: what a plan is made of, and its one launch per step.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "checks.h"
#include "cuda/fused_adam.cuh"
#include "cuda/fused_sgd.cuh"
#include "cuda/launch.h"
#include "handles.h"

namespace fastfreeze {
namespace {

// Names of tensors that fastfreeze/kernels/device_plan.py owns for as long as it steps the plan.
template <typename Tables>
struct CudaPlan {
  static constexpr const char* kName = "plan of a CUDA device";
  Tables tables;
  ScalarType param;
  ScalarType state;
  int32_t device;
};

template <typename Rule, typename Grads>
void launch_step(const CudaPlan<typename Rule::Tables>& plan, const Grads& grads,
                 const StepCall& call) {
  constexpr int64_t kRunsPerBlock = kStepThreads / 32;
  const int64_t blocks = (plan.tables.num_runs + kRunsPerBlock - 1) / kRunsPerBlock;
  const auto grid = static_cast<unsigned>(std::max<int64_t>(1, blocks));
  step_kernel<Rule>
      <<<grid, kStepThreads, 0, current_stream(plan.device)>>>(plan.tables, grads, call);
  check_launch("step_kernel");
}

// A rule's operators.
template <template <typename P, typename M> class Rule>
struct CudaStep {
  using Tables = typename Rule<float, float>::Tables;
  using Plan = CudaPlan<Tables>;

  // runs: int64 [r, kStates + 3], rows of Run; hypers: float64 [g, kColumns]; segments: float64
  // [s, 3]; segment_begin: int64 [g + 1, 1]; tensor_groups: int32 [n, 1]; progress: uint8 or
  // float32 [n, 1]; counters: int64 [2, 1], the step and the blocks that have arrived.
  static int64_t plan(Tensor runs, Tensor hypers, Tensor segments, Tensor segment_begin,
                      Tensor tensor_groups, Tensor progress, Tensor counters, int64_t run_elements,
                      double eta_min, int64_t warmup_steps, int64_t param_dtype,
                      int64_t state_dtype) {
    using Row = Run<Tables::kStates>;
    using Progress = typename Tables::Progress;
    check_table(runs, "runs", ScalarType::Long, sizeof(Row) / sizeof(int64_t));
    check_table(hypers, "hypers", ScalarType::Double, Tables::kColumns);
    check_table(segments, "segments", ScalarType::Double, 3);
    check_table(segment_begin, "segment_begin", ScalarType::Long, 1);
    check_table(tensor_groups, "tensor_groups", ScalarType::Int, 1);
    check_table(progress, "progress",
                std::is_same_v<Progress, float> ? ScalarType::Float : ScalarType::Byte, 1);
    check_table(counters, "counters", ScalarType::Long, 1);
    const int64_t tensors = progress.size(0);
    STD_TORCH_CHECK(segment_begin.size(0) == hypers.size(0) + 1,
                    "hypers and segment_begin must agree on the number of groups");
    STD_TORCH_CHECK(tensor_groups.size(0) == tensors, "tensor_groups and progress must agree");
    STD_TORCH_CHECK(counters.size(0) == 2, "counters must have shape [2, 1]");
    auto plan = std::make_shared<Plan>();
    auto* counter = static_cast<int64_t*>(counters.data_ptr());
    plan->tables = {static_cast<const Row*>(runs.data_ptr()),
                    static_cast<const double*>(hypers.data_ptr()),
                    {static_cast<const Segment*>(segments.data_ptr()),
                     static_cast<const int64_t*>(segment_begin.data_ptr()), eta_min,
                     static_cast<double>(warmup_steps)},
                    static_cast<const int32_t*>(tensor_groups.data_ptr()),
                    static_cast<Progress*>(progress.data_ptr()),
                    counter,
                    reinterpret_cast<unsigned*>(counter + 1),
                    runs.size(0),
                    static_cast<int32_t>(run_elements),
                    static_cast<int32_t>(tensors)};
    plan->param = static_cast<ScalarType>(param_dtype);
    plan->state = static_cast<ScalarType>(state_dtype);
    plan->device = runs.get_device_index();
    return Handles<Plan>::all().add(std::move(plan));
  }

  // grads: address, on the host, of int64 [n], 0 where a tensor has no gradient. With more than
  // kGradArguments tensors grad_table is the address of the same on the device. found_inf and
  // grad_scale: addresses, on the device, of a float32 each, or 0.
  static void step(int64_t handle, int64_t grads, int64_t grad_table, int64_t found_inf,
                   int64_t grad_scale, bool track) {
    const std::shared_ptr<Plan> plan = Handles<Plan>::all().get(handle);
    const DeviceGuard guard(plan->device);
    const StepCall call{reinterpret_cast<const float*>(found_inf),
                        reinterpret_cast<const float*>(grad_scale), track};
    if (grad_table != 0) {
      return launch(*plan, GradTable{reinterpret_cast<const int64_t*>(grad_table)}, call);
    }
    const int32_t tensors = plan->tables.num_tensors;
    STD_TORCH_CHECK(tensors <= kGradArguments, tensors, " tensors need a grad_table");
    GradArguments arguments{};
    std::copy_n(reinterpret_cast<const int64_t*>(grads), tensors, arguments.address);
    launch(*plan, arguments, call);
  }

  static void free(int64_t handle) { Handles<Plan>::all().remove(handle); }

 private:
  template <typename Grads>
  static void launch(const Plan& plan, const Grads& grads, const StepCall& call) {
    const bool wide = plan.state != plan.param;
    STD_TORCH_CHECK(!wide || plan.state == ScalarType::Float, "a state of another dtype than its ",
                    "parameter's must be float32");
    switch (plan.param) {
      case ScalarType::Float:
        return launch_step<Rule<float, float>>(plan, grads, call);
      case ScalarType::Double:
        return launch_step<Rule<double, double>>(plan, grads, call);
      case ScalarType::Half:
        return wide ? launch_step<Rule<__half, float>>(plan, grads, call)
                    : launch_step<Rule<__half, __half>>(plan, grads, call);
      case ScalarType::BFloat16:
        return wide ? launch_step<Rule<__nv_bfloat16, float>>(plan, grads, call)
                    : launch_step<Rule<__nv_bfloat16, __nv_bfloat16>>(plan, grads, call);
      default:
        STD_TORCH_CHECK(false, "parameters must be float16, bfloat16, float32 or float64");
    }
  }
};

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  using Sgd = fastfreeze::CudaStep<fastfreeze::SgdRule>;
  m.impl("cuda_sgd_plan", TORCH_BOX(&Sgd::plan));
  m.impl("cuda_sgd_step", TORCH_BOX(&Sgd::step));
  m.impl("cuda_sgd_plan_free", TORCH_BOX(&Sgd::free));
  using Adam = fastfreeze::CudaStep<fastfreeze::AdamRule>;
  m.impl("cuda_adam_plan", TORCH_BOX(&Adam::plan));
  m.impl("cuda_adam_step", TORCH_BOX(&Adam::step));
  m.impl("cuda_adam_plan_free", TORCH_BOX(&Adam::free));
}
