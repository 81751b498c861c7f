// The host's side of SGD on a CUDA device: what a plan is made of, and its one launch per step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "checks.h"
#include "cuda/fused_sgd.cuh"
#include "cuda/launch.h"
#include "handles.h"

namespace fastfreeze {
namespace {

// Names of tensors that fastfreeze/ops/_device_sgd.py owns for as long as it steps the plan.
struct CudaPlan {
  static constexpr const char* kName = "SGD plan";
  SgdTables tables;
  ScalarType param;
  ScalarType buffer;
  int32_t device;
};

// runs: int64 [r, 4], rows of SgdRun; hypers: float64 [g, kHyperColumns]; segments: float64 [s, 3];
// segment_begin: int64 [g + 1, 1]; tensor_groups: int32 [n, 1]; started: uint8 [n, 1]; counters:
// int64 [2, 1], the step and the blocks that have arrived.
int64_t cuda_sgd_plan(Tensor runs, Tensor hypers, Tensor segments, Tensor segment_begin,
                      Tensor tensor_groups, Tensor started, Tensor counters, int64_t run_elements,
                      double eta_min, int64_t warmup_steps, int64_t param_dtype,
                      int64_t buffer_dtype) {
  static_assert(sizeof(SgdRun) == 4 * sizeof(int64_t));
  check_table(runs, "runs", ScalarType::Long, 4);
  check_table(hypers, "hypers", ScalarType::Double, kHyperColumns);
  check_table(segments, "segments", ScalarType::Double, 3);
  check_table(segment_begin, "segment_begin", ScalarType::Long, 1);
  check_table(tensor_groups, "tensor_groups", ScalarType::Int, 1);
  check_table(started, "started", ScalarType::Byte, 1);
  check_table(counters, "counters", ScalarType::Long, 1);
  const int64_t tensors = started.size(0);
  STD_TORCH_CHECK(segment_begin.size(0) == hypers.size(0) + 1,
                  "hypers and segment_begin must agree on the number of groups");
  STD_TORCH_CHECK(tensor_groups.size(0) == tensors, "tensor_groups and started must agree");
  STD_TORCH_CHECK(counters.size(0) == 2, "counters must have shape [2, 1]");
  auto plan = std::make_shared<CudaPlan>();
  auto* counter = static_cast<int64_t*>(counters.data_ptr());
  plan->tables = {static_cast<const SgdRun*>(runs.data_ptr()),
                  static_cast<const double*>(hypers.data_ptr()),
                  {static_cast<const Segment*>(segments.data_ptr()),
                   static_cast<const int64_t*>(segment_begin.data_ptr()), eta_min,
                   static_cast<double>(warmup_steps)},
                  static_cast<const int32_t*>(tensor_groups.data_ptr()),
                  static_cast<uint8_t*>(started.data_ptr()),
                  counter,
                  reinterpret_cast<unsigned*>(counter + 1),
                  runs.size(0),
                  static_cast<int32_t>(run_elements),
                  static_cast<int32_t>(tensors)};
  plan->param = static_cast<ScalarType>(param_dtype);
  plan->buffer = static_cast<ScalarType>(buffer_dtype);
  plan->device = runs.get_device_index();
  return Handles<CudaPlan>::all().add(std::move(plan));
}

template <typename P, typename M, typename Grads>
void launch(const CudaPlan& plan, const Grads& grads, const SgdCall& call) {
  constexpr int64_t kRunsPerBlock = kSgdThreads / 32;
  const int64_t blocks = (plan.tables.num_runs + kRunsPerBlock - 1) / kRunsPerBlock;
  const auto grid = static_cast<unsigned>(std::max<int64_t>(1, blocks));
  sgd_kernel<P, M><<<grid, kSgdThreads, 0, current_stream(plan.device)>>>(plan.tables, grads, call);
  check_launch("sgd_kernel");
}

template <typename Grads>
void launch(const CudaPlan& plan, const Grads& grads, const SgdCall& call) {
  const bool wide = plan.buffer != plan.param;
  STD_TORCH_CHECK(!wide || plan.buffer == ScalarType::Float, "a momentum buffer of another dtype ",
                  "than its parameter's must be float32");
  switch (plan.param) {
    case ScalarType::Float:
      return launch<float, float>(plan, grads, call);
    case ScalarType::Double:
      return launch<double, double>(plan, grads, call);
    case ScalarType::Half:
      return wide ? launch<__half, float>(plan, grads, call)
                  : launch<__half, __half>(plan, grads, call);
    case ScalarType::BFloat16:
      return wide ? launch<__nv_bfloat16, float>(plan, grads, call)
                  : launch<__nv_bfloat16, __nv_bfloat16>(plan, grads, call);
    default:
      STD_TORCH_CHECK(false, "parameters must be float16, bfloat16, float32 or float64");
  }
}

// grads: address, on the host, of int64 [n], 0 where a tensor has no gradient. With more than
// kSgdArguments tensors grad_table is the address of the same on the device. found_inf and
// grad_scale: addresses, on the device, of a float32 each, or 0.
void cuda_sgd_step(int64_t handle, int64_t grads, int64_t grad_table, int64_t found_inf,
                   int64_t grad_scale, bool track) {
  const std::shared_ptr<CudaPlan> plan = Handles<CudaPlan>::all().get(handle);
  const DeviceGuard guard(plan->device);
  const SgdCall call{reinterpret_cast<const float*>(found_inf),
                     reinterpret_cast<const float*>(grad_scale), track};
  if (grad_table != 0) {
    return launch(*plan, GradTable{reinterpret_cast<const int64_t*>(grad_table)}, call);
  }
  STD_TORCH_CHECK(plan->tables.num_tensors <= kSgdArguments, plan->tables.num_tensors,
                  " tensors need a grad_table");
  GradArguments arguments{};
  std::copy_n(reinterpret_cast<const int64_t*>(grads), plan->tables.num_tensors, arguments.address);
  launch(*plan, arguments, call);
}

void cuda_sgd_plan_free(int64_t handle) { Handles<CudaPlan>::all().remove(handle); }

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  m.impl("cuda_sgd_plan", TORCH_BOX(&fastfreeze::cuda_sgd_plan));
  m.impl("cuda_sgd_step", TORCH_BOX(&fastfreeze::cuda_sgd_step));
  m.impl("cuda_sgd_plan_free", TORCH_BOX(&fastfreeze::cuda_sgd_plan_free));
}
