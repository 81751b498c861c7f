// SGD over any number of tensors and groups in one parallel region.
//
// What does not change between steps lives in a plan, made once and named by a handle: tensors,
// the runs of elements they are cut into, segments of the schedule. A step brings the gradients'
// addresses and the groups' hyperparameters.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/planned_runs.h"
#include "handles.h"
#include "sgd_tables.h"

namespace fastfreeze {
namespace {

// Columns of the table of tensors that fastfreeze/kernels/sgd_plans.py fills.
enum TensorColumn { kParam, kBuffer, kNumel, kGroup, kDtype, kBufferDtype, kFirst, kTensorColumns };

struct PlannedTensor {
  char* param;
  char* buffer;
  int64_t group;
  int64_t item_size;
  int64_t buffer_item_size;
  ScalarType dtype;
  bool wide_buffer;  // fp32 momentum of a 16-bit parameter
  Momentum momentum;
};

struct Plan : PlannedRuns {
  using PlannedRuns::PlannedRuns;
  static constexpr const char* kName = "SGD plan";
  std::vector<PlannedTensor> tensors;
};

struct GroupHyper {
  SgdHyper<float> single;
  SgdHyper<double> twice;
  bool store_grad;
};

// A run of elements of one tensor, as the loops see it.
struct Elements {
  void* param;
  void* grad;
  void* buffer;
  int64_t size;
  ScalarType dtype;
  bool wide_buffer;
  Momentum momentum;
};

#define FASTFREEZE_LOOPS "cpu/fused_sgd_loops.h"
#include "cpu/each_isa.h"

using UpdateFn = void (*)(const Elements&, const GroupHyper&);

// Memory is what limits a step: wider loops gain nothing, and on AMD's Zen 4 they take 8% longer
// in fp32 and twice as long in 16 bits.
UpdateFn update_for(Isa isa) { return FASTFREEZE_OF_ISA(std::min(isa, Isa::avx2), update); }

void add_tensor(Plan& plan, const int64_t* row) {
  PlannedTensor t;
  t.param = reinterpret_cast<char*>(row[kParam]);
  t.buffer = reinterpret_cast<char*>(row[kBuffer]);
  t.group = row[kGroup];
  t.dtype = static_cast<ScalarType>(row[kDtype]);
  t.item_size = item_size(t.dtype);
  const auto buffer_dtype = static_cast<ScalarType>(row[kBufferDtype]);
  t.buffer_item_size = item_size(buffer_dtype);
  t.wide_buffer = is_wide_state(t.dtype, buffer_dtype, "momentum buffer");
  t.momentum = t.buffer == nullptr ? Momentum::none
               : row[kFirst] != 0  ? Momentum::first
                                   : Momentum::running;
  plan.add(t.group, row[kNumel]);
  plan.tensors.push_back(t);
}

// tensors: int64 [n, 7]; the rest as of PlannedRuns.
int64_t sgd_plan(Tensor tensors, Tensor segments, Tensor segment_begin, double eta_min,
                 int64_t warmup_steps) {
  check_table(tensors, "tensors", ScalarType::Long, kTensorColumns, true);
  auto plan = std::make_shared<Plan>(segments, segment_begin, eta_min, warmup_steps);
  const auto* row = static_cast<const int64_t*>(tensors.data_ptr());
  for (int64_t i = 0; i < tensors.size(0); ++i) add_tensor(*plan, row + i * kTensorColumns);
  return Handles<Plan>::all().add(std::move(plan));
}

// grads: address of int64 [n], 0 where a tensor has no gradient; hypers: address of float64
// [num_groups, 7]; lrs: address of float64 [num_groups], receives the learning rates of step + 1.
void sgd_step(int64_t handle, int64_t grads, int64_t hypers, int64_t step, double inv_grad_scale,
              bool store_grad, int64_t lrs) {
  const std::shared_ptr<Plan> plan = Handles<Plan>::all().get(handle);
  const auto* grad = reinterpret_cast<const int64_t*>(grads);
  const auto* row = reinterpret_cast<const double*>(hypers);
  std::vector<GroupHyper> groups(plan->num_groups());
  for (int64_t g = 0; g < plan->num_groups(); ++g, row += kHyperColumns) {
    const auto lr_at = [&](int64_t at) {
      return group_rate(plan->table(), g, row[kLr], row[kInitialLr], at).lr;
    };
    const double lr = lr_at(step);
    groups[g] = {hyper_of<float>(row, lr, inv_grad_scale),
                 hyper_of<double>(row, lr, inv_grad_scale), store_grad};
    reinterpret_cast<double*>(lrs)[g] = lr_at(step + 1);
  }
  const UpdateFn update = update_for(current_isa());
  const auto has_gradient = [&](int64_t tensor) { return grad[tensor] != 0; };
  const auto expect = [&](int64_t tensor) {
    const PlannedTensor& t = plan->tensors[tensor];
    prefetch(t.param);
    prefetch(reinterpret_cast<const void*>(grad[tensor]));
    prefetch(t.buffer);
  };
  plan->for_each(has_gradient, expect, [&](const Run& run) {
    const PlannedTensor& t = plan->tensors[run.tensor];
    char* g = reinterpret_cast<char*>(grad[run.tensor]);
    const int64_t bytes = run.offset * t.item_size;
    char* buffer = t.buffer == nullptr ? nullptr : t.buffer + run.offset * t.buffer_item_size;
    update({t.param + bytes, g + bytes, buffer, run.size, t.dtype, t.wide_buffer, t.momentum},
           groups[t.group]);
  });
  for (size_t i = 0; i < plan->tensors.size(); ++i) {
    PlannedTensor& t = plan->tensors[i];
    if (t.momentum == Momentum::first && grad[i] != 0) t.momentum = Momentum::running;
  }
}

void sgd_plan_free(int64_t handle) { Handles<Plan>::all().remove(handle); }

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  m.impl("sgd_plan", TORCH_BOX(&fastfreeze::sgd_plan));
  m.impl("sgd_step", TORCH_BOX(&fastfreeze::sgd_step));
  m.impl("sgd_plan_free", TORCH_BOX(&fastfreeze::sgd_plan_free));
}
