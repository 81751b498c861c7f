// Adam and AdamW over any number of tensors and groups in one parallel region, as
// fused_sgd_kernel.cpp does SGD. How many steps each tensor has taken is in memory that the plan
// names: it is read and advanced there.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "adam_tables.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/planned_runs.h"
#include "handles.h"

namespace fastfreeze {
namespace {

// Columns of the table of tensors that fastfreeze/kernels/adam_plans.py fills.
enum TensorColumn {
  kParam,
  kMean,
  kSquare,
  kMaxSquare,
  kNumel,
  kGroup,
  kDtype,
  kStateDtype,
  kTensorColumns
};

struct PlannedTensor {
  char* param;
  char* mean;        // exp_avg
  char* square;      // exp_avg_sq
  char* max_square;  // max_exp_avg_sq; nullptr without amsgrad
  int64_t group;
  int64_t item_size;
  int64_t state_item_size;
  ScalarType dtype;
  bool wide_state;  // fp32 moments of a 16-bit parameter
};

struct Plan : PlannedRuns {
  using PlannedRuns::PlannedRuns;
  static constexpr const char* kName = "Adam plan";
  std::vector<PlannedTensor> tensors;
  float* steps;
};

// What is the same for all tensors of a group that have taken equally many steps.
struct TensorStep {
  AdamHyper<float> single;
  AdamHyper<double> twice;
  float k;  // the step, counted from 1
  bool amsgrad;
  bool store_grad;
  template <typename T>
  const AdamHyper<T>& of() const {
    if constexpr (std::is_same_v<T, double>)
      return twice;
    else
      return single;
  }
};

// A run of elements of one tensor, as the loops see it.
struct Elements {
  void* param;
  void* grad;
  void* mean;
  void* square;
  void* max_square;
  int64_t size;
  ScalarType dtype;
  bool wide_state;
};

#define FASTFREEZE_LOOPS "cpu/fused_adam_loops.h"
#include "cpu/each_isa.h"

using UpdateFn = void (*)(const Elements&, const TensorStep&);

// As in fused_sgd_kernel.cpp, wider loops gain nothing.
UpdateFn update_for(Isa isa) { return FASTFREEZE_OF_ISA(std::min(isa, Isa::avx2), update); }

void add_tensor(Plan& plan, const int64_t* row) {
  PlannedTensor t;
  t.param = reinterpret_cast<char*>(row[kParam]);
  t.mean = reinterpret_cast<char*>(row[kMean]);
  t.square = reinterpret_cast<char*>(row[kSquare]);
  t.max_square = reinterpret_cast<char*>(row[kMaxSquare]);
  t.group = row[kGroup];
  t.dtype = static_cast<ScalarType>(row[kDtype]);
  t.item_size = item_size(t.dtype);
  const auto state_dtype = static_cast<ScalarType>(row[kStateDtype]);
  t.state_item_size = item_size(state_dtype);
  t.wide_state = is_wide_state(t.dtype, state_dtype, "exp_avg");
  plan.add(t.group, row[kNumel]);
  plan.tensors.push_back(t);
}

// tensors: int64 [n, 8]; steps: float32 [n, 1], which outlives the plan; the rest as of
// PlannedRuns.
int64_t adam_plan(Tensor tensors, Tensor steps, Tensor segments, Tensor segment_begin,
                  double eta_min, int64_t warmup_steps) {
  check_table(tensors, "tensors", ScalarType::Long, kTensorColumns, true);
  check_table(steps, "steps", ScalarType::Float, 1, true);
  STD_TORCH_CHECK(steps.size(0) == tensors.size(0), "steps must have a row for each tensor");
  auto plan = std::make_shared<Plan>(segments, segment_begin, eta_min, warmup_steps);
  plan->steps = static_cast<float*>(steps.data_ptr());
  const auto* row = static_cast<const int64_t*>(tensors.data_ptr());
  for (int64_t i = 0; i < tensors.size(0); ++i) add_tensor(*plan, row + i * kTensorColumns);
  return Handles<Plan>::all().add(std::move(plan));
}

GroupRate rate_at(const Plan& plan, const double* hypers, int64_t group, int64_t step) {
  const double* row = hypers + group * AdamColumn::kCount;
  return group_rate(plan.table(), group, row[AdamColumn::kLr], row[AdamColumn::kInitialLr], step);
}

struct Call {
  std::vector<TensorStep> steps;   // each once
  std::vector<int64_t> of_tensor;  // which is a tensor's; kNone: no gradient, or frozen
  static constexpr int64_t kNone = -1;
};

Call call_of(const Plan& plan, const int64_t* grads, const double* hypers, int64_t step,
             double inv_grad_scale, bool store_grad) {
  std::vector<GroupRate> rates;
  for (int64_t g = 0; g < plan.num_groups(); ++g) rates.push_back(rate_at(plan, hypers, g, step));
  std::vector<int64_t> latest(rates.size(), Call::kNone);
  Call call;
  call.of_tensor.assign(plan.tensors.size(), Call::kNone);
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const PlannedTensor& t = plan.tensors[i];
    const GroupRate& rate = rates[t.group];
    if (grads[i] == 0 || rate.frozen) continue;
    const double* row = hypers + t.group * AdamColumn::kCount;
    const bool amsgrad = row[AdamColumn::kAmsgrad] != 0;
    STD_TORCH_CHECK(
        t.mean != nullptr && t.square != nullptr && (t.max_square != nullptr || !amsgrad),
        "parameter ", i, " has a gradient and no moments");
    const float k = plan.steps[i] + 1;
    int64_t& at = latest[t.group];
    if (at == Call::kNone || call.steps[at].k != k) {
      const BiasCorrection bias = bias_correction(row, k);
      at = static_cast<int64_t>(call.steps.size());
      call.steps.push_back({adam_hyper_of<float>(row, rate.lr, bias, inv_grad_scale),
                            adam_hyper_of<double>(row, rate.lr, bias, inv_grad_scale), k, amsgrad,
                            store_grad});
    }
    call.of_tensor[i] = at;
  }
  return call;
}

// At a tensor's first step its moments are 0, whatever their memory holds.
void clear(const Elements& e, int64_t state_item_size) {
  for (void* moment : {e.mean, e.square, e.max_square}) {
    if (moment != nullptr) std::memset(moment, 0, e.size * state_item_size);
  }
}

char* moved(char* base, int64_t bytes) { return base == nullptr ? nullptr : base + bytes; }

// grads: address of int64 [n], 0 where a tensor has no gradient; hypers: address of float64
// [num_groups, 9]; lrs: address of float64 [num_groups], receives the learning rates of step + 1.
void adam_step(int64_t handle, int64_t grads, int64_t hypers, int64_t step, double inv_grad_scale,
               bool store_grad, int64_t lrs) {
  const std::shared_ptr<Plan> plan = Handles<Plan>::all().get(handle);
  const auto* grad = reinterpret_cast<const int64_t*>(grads);
  const auto* rows = reinterpret_cast<const double*>(hypers);
  const Call call = call_of(*plan, grad, rows, step, inv_grad_scale, store_grad);
  const UpdateFn update = update_for(current_isa());
  const auto is_live = [&](int64_t tensor) { return call.of_tensor[tensor] != Call::kNone; };
  const auto expect = [&](int64_t tensor) {
    const PlannedTensor& t = plan->tensors[tensor];
    prefetch(t.param);
    prefetch(reinterpret_cast<const void*>(grad[tensor]));
    prefetch(t.mean);
    prefetch(t.square);
  };
  plan->for_each(is_live, expect, [&](const Run& run) {
    const PlannedTensor& t = plan->tensors[run.tensor];
    const int64_t at = run.offset * t.item_size, state_at = run.offset * t.state_item_size;
    const Elements elements{t.param + at,
                            reinterpret_cast<char*>(grad[run.tensor]) + at,
                            t.mean + state_at,
                            t.square + state_at,
                            moved(t.max_square, state_at),
                            run.size,
                            t.dtype,
                            t.wide_state};
    const TensorStep& tensor_step = call.steps[call.of_tensor[run.tensor]];
    if (tensor_step.k == 1) clear(elements, t.state_item_size);
    update(elements, tensor_step);
  });
  for (size_t i = 0; i < plan->tensors.size(); ++i) {
    if (call.of_tensor[i] != Call::kNone) plan->steps[i] = call.steps[call.of_tensor[i]].k;
  }
  for (int64_t g = 0; g < plan->num_groups(); ++g) {
    reinterpret_cast<double*>(lrs)[g] = rate_at(*plan, rows, g, step + 1).lr;
  }
}

void adam_plan_free(int64_t handle) { Handles<Plan>::all().remove(handle); }

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  m.impl("adam_plan", TORCH_BOX(&fastfreeze::adam_plan));
  m.impl("adam_step", TORCH_BOX(&fastfreeze::adam_step));
  m.impl("adam_plan_free", TORCH_BOX(&fastfreeze::adam_plan_free));
}
