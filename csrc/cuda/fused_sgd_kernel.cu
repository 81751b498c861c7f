// The operators of SGD on a CUDA device.
#include <torch/csrc/stable/library.h>

#include "cuda/fused_sgd.cuh"
#include "cuda/step_launch.h"

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  using Step = fastfreeze::CudaStep<fastfreeze::SgdRule>;
  m.impl("cuda_sgd_plan", TORCH_BOX(&Step::plan));
  m.impl("cuda_sgd_step", TORCH_BOX(&Step::step));
  m.impl("cuda_sgd_plan_free", TORCH_BOX(&Step::free));
}
