// The operators of Adam on a CUDA device.
#include <torch/csrc/stable/library.h>

#include "cuda/fused_adam.cuh"
#include "cuda/step_launch.h"

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  using Step = fastfreeze::CudaStep<fastfreeze::AdamRule>;
  m.impl("cuda_adam_plan", TORCH_BOX(&Step::plan));
  m.impl("cuda_adam_step", TORCH_BOX(&Step::step));
  m.impl("cuda_adam_plan_free", TORCH_BOX(&Step::free));
}
