// SGD over any number of tensors and groups in one parallel region.
//
// What does not change between steps lives in a plan, made once and named by a handle: tensors,
// the runs of elements they are cut into, segments of the schedule. A step brings the gradients'
// addresses and the groups' hyperparameters.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "handles.h"
#include "sgd_tables.h"

namespace fastfreeze {
namespace {

// Columns of the table of tensors that fastfreeze/ops/sgd.py fills.
enum TensorColumn { kParam, kBuffer, kNumel, kGroup, kDtype, kBufferDtype, kFirst, kTensorColumns };

constexpr int64_t kRunElements = 8192;  // 32 KB of fp32: three such runs fit in an L2 cache
constexpr int64_t kElementsPerThread =
    32768;  // below this a second thread costs more than it saves

struct Run {
  int64_t tensor;
  int64_t offset;
  int64_t size;
};

struct PlannedTensor {
  char* param;
  char* buffer;
  int64_t numel;
  int64_t group;
  int64_t item_size;
  int64_t buffer_item_size;
  ScalarType dtype;
  bool wide_buffer;  // fp32 momentum of a 16-bit parameter
  Momentum momentum;
};

struct Plan {
  static constexpr const char* kName = "SGD plan";
  std::vector<PlannedTensor> tensors;
  std::vector<Run> runs;
  std::vector<int64_t> cost;  // elements in the runs before each run, and in all
  std::vector<Segment> segments;
  std::vector<int64_t> segment_begin;
  double eta_min;
  double warmup_steps;
  int64_t num_groups() const { return static_cast<int64_t>(segment_begin.size()) - 1; }
  SegmentTable table() const {
    return {segments.data(), segment_begin.data(), eta_min, warmup_steps};
  }
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

int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

void add_tensor(Plan& plan, const int64_t* row) {
  PlannedTensor t;
  t.param = reinterpret_cast<char*>(row[kParam]);
  t.buffer = reinterpret_cast<char*>(row[kBuffer]);
  t.numel = row[kNumel];
  t.group = row[kGroup];
  t.dtype = static_cast<ScalarType>(row[kDtype]);
  t.item_size = item_size(t.dtype);
  const auto buffer_dtype = static_cast<ScalarType>(row[kBufferDtype]);
  t.buffer_item_size = item_size(buffer_dtype);
  t.wide_buffer = buffer_dtype != t.dtype;
  STD_TORCH_CHECK(!t.wide_buffer || (t.item_size == 2 && buffer_dtype == ScalarType::Float), "a ",
                  dtype_name(t.dtype), " parameter has a ", dtype_name(buffer_dtype),
                  " momentum buffer");
  STD_TORCH_CHECK(t.group >= 0 && t.group < plan.num_groups(), "a tensor names group ", t.group);
  STD_TORCH_CHECK(t.numel >= 0, "a tensor has ", t.numel, " elements");
  t.momentum = t.buffer == nullptr ? Momentum::none
               : row[kFirst] != 0  ? Momentum::first
                                   : Momentum::running;
  const int64_t index = static_cast<int64_t>(plan.tensors.size());
  for (int64_t at = 0; at < t.numel; at += kRunElements) {
    const int64_t size = std::min(kRunElements, t.numel - at);
    plan.runs.push_back({index, at, size});
    plan.cost.push_back(plan.cost.back() + size);
  }
  plan.tensors.push_back(t);
}

// tensors: int64 [n, 7]; segments: float64 [s, 3]; segment_begin: int64 [num_groups + 1, 1].
int64_t sgd_plan(Tensor tensors, Tensor segments, Tensor segment_begin, double eta_min,
                 int64_t warmup_steps) {
  check_table(tensors, "tensors", ScalarType::Long, kTensorColumns, true);
  check_table(segments, "segments", ScalarType::Double, 3, true);
  check_table(segment_begin, "segment_begin", ScalarType::Long, 1, true);
  STD_TORCH_CHECK(segment_begin.size(0) >= 1, "segment_begin must not be empty");
  auto plan = std::make_shared<Plan>();
  plan->eta_min = eta_min;
  plan->warmup_steps = static_cast<double>(warmup_steps);
  const auto* begin = static_cast<const int64_t*>(segment_begin.data_ptr());
  plan->segment_begin.assign(begin, begin + segment_begin.size(0));
  STD_TORCH_CHECK(plan->segment_begin.back() == segments.size(0),
                  "segment_begin must end with the number of segments");
  STD_TORCH_CHECK(plan->segment_begin.front() == 0 &&
                      std::is_sorted(plan->segment_begin.begin(), plan->segment_begin.end()),
                  "segment_begin must rise from 0");
  const auto* segment = static_cast<const double*>(segments.data_ptr());
  for (int64_t i = 0; i < segments.size(0); ++i, segment += 3) {
    plan->segments.push_back({segment[0], segment[1], segment[2]});
  }
  plan->cost.push_back(0);
  const auto* row = static_cast<const int64_t*>(tensors.data_ptr());
  for (int64_t i = 0; i < tensors.size(0); ++i) add_tensor(*plan, row + i * kTensorColumns);
  return Handles<Plan>::all().add(std::move(plan));
}

void update_runs(const Plan& plan, const std::vector<GroupHyper>& groups, const int64_t* grads,
                 int64_t begin, int64_t end, UpdateFn update) {
  for (int64_t r = begin; r < end; ++r) {
    const Run& run = plan.runs[r];
    const PlannedTensor& t = plan.tensors[run.tensor];
    char* grad = reinterpret_cast<char*>(grads[run.tensor]);
    if (grad == nullptr) continue;
    const int64_t bytes = run.offset * t.item_size;
    char* buffer = t.buffer == nullptr ? nullptr : t.buffer + run.offset * t.buffer_item_size;
    update({t.param + bytes, grad + bytes, buffer, run.size, t.dtype, t.wide_buffer, t.momentum},
           groups[t.group]);
  }
}

// The first run of a thread's share, threads having equal numbers of elements.
int64_t first_run(const Plan& plan, int64_t thread, int64_t threads) {
  const int64_t target = plan.cost.back() * thread / threads;
  return std::lower_bound(plan.cost.begin(), plan.cost.end(), target) - plan.cost.begin();
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
    const double lr = group_rate(plan->table(), g, row, step).lr;
    groups[g] = {hyper_of<float>(row, lr, inv_grad_scale),
                 hyper_of<double>(row, lr, inv_grad_scale), store_grad};
    reinterpret_cast<double*>(lrs)[g] = group_rate(plan->table(), g, row, step + 1).lr;
  }
  const UpdateFn update = update_for(current_isa());
  const int64_t wanted = (plan->cost.back() + kElementsPerThread - 1) / kElementsPerThread;
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(wanted, torch::stable::get_num_threads()));
  const auto share = [&](int64_t begin, int64_t end) {
    update_runs(*plan, groups, grad, first_run(*plan, begin, threads),
                first_run(*plan, end, threads), update);
  };
  if (threads == 1) {
    share(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, share);
  }
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
