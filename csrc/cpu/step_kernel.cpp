// A step of SGD or Adam over any number of tensors and groups in one parallel region.
//
// What does not change between steps lives in a plan, made once and named by a handle: tensors and
// segments of the schedule. A step brings the gradients' addresses and the groups' hyperparameters.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "adam_math.h"
#include "checks.h"
#include "cpu/isa.h"
#include "handles.h"
#include "schedule_math.h"
#include "sgd_math.h"

namespace fastfreeze {
namespace {

constexpr int kMostStates = 3;
constexpr int64_t kRunElements = 8192;  // 32 KB of fp32: three such runs fit in an L2 cache
constexpr int64_t kElementsPerThread =
    32768;  // below this a second thread costs more than it saves

struct PlannedTensor {
  char* param;
  char* states[kMostStates];  // nullptr: none
  int64_t numel;
  int64_t group;
  int64_t item_size;
  int64_t state_item_size;
  ScalarType dtype;
  bool wide_state;  // fp32 states of a 16-bit parameter
};

// A run of elements of one tensor, as the loops see it.
struct Elements {
  void* param;
  void* grad;
  void* states[kMostStates];
  int64_t size;
  ScalarType dtype;
  bool wide_state;
};

// What is the same for all tensors of a group that have come equally far. progress: how many steps
// a tensor has taken, of which SGD counts one.
template <typename Rule>
struct TensorStep {
  typename Rule::template Hyper<float> single;
  typename Rule::template Hyper<double> twice;
  float progress;
  bool store_grad;
  template <typename T>
  const auto& of() const {
    if constexpr (std::is_same_v<T, double>)
      return twice;
    else
      return single;
  }
};

struct Sgd {
  static constexpr const char* kName = "SGD plan";
  static constexpr int kStates = 1;
  using Column = SgdColumn;
  template <typename T>
  using Hyper = SgdHyper<T>;

  template <Momentum kMomentum>
  struct Kind {
    static constexpr int kStates = kMomentum == Momentum::none ? 0 : 1;
    template <bool kFused, typename T>
    static FASTFREEZE_INLINE void update(T& p, T& g, T& buffer, T&, T&, const SgdHyper<T>& h) {
      sgd_update<kMomentum, kFused>(p, g, buffer, h);
    }
  };

  static float after_step(float) { return 1; }
  static TensorStep<Sgd> step(const double* row, double lr, float progress, double inv_grad_scale,
                              bool store_grad) {
    return {sgd_hyper_of<float>(row, lr, inv_grad_scale),
            sgd_hyper_of<double>(row, lr, inv_grad_scale), progress, store_grad};
  }
  template <typename Body>
  static void with_kind(const Elements& e, float progress, const Body& body) {
    if (e.states[0] == nullptr) return body(Kind<Momentum::none>{});
    if (progress == 0) return body(Kind<Momentum::first>{});
    body(Kind<Momentum::running>{});
  }

  static bool has_states(const PlannedTensor&, const double*) { return true; }
  static void prepare(const PlannedTensor&, const Elements&, float) {}
};

struct Adam {
  static constexpr const char* kName = "Adam plan";
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq with amsgrad
  using Column = AdamColumn;
  template <typename T>
  using Hyper = AdamHyper<T>;

  template <bool kAmsgrad>
  struct Kind {
    static constexpr int kStates = kAmsgrad ? 3 : 2;
    template <bool kFused, typename T>
    static FASTFREEZE_INLINE void update(T& p, T& g, T& mean, T& square, T& largest,
                                         const AdamHyper<T>& h) {
      adam_update<kAmsgrad, kFused>(p, g, mean, square, largest, h);
    }
  };
  template <typename Body>
  static void with_kind(const Elements& e, float, const Body& body) {
    if (e.states[2] == nullptr) return body(Kind<false>{});
    body(Kind<true>{});
  }

  static float after_step(float progress) { return progress + 1; }
  static TensorStep<Adam> step(const double* row, double lr, float progress, double inv_grad_scale,
                               bool store_grad) {
    const BiasCorrection bias = bias_correction(row, progress + 1);
    return {adam_hyper_of<float>(row, lr, bias, inv_grad_scale),
            adam_hyper_of<double>(row, lr, bias, inv_grad_scale), progress, store_grad};
  }
  static bool has_states(const PlannedTensor& t, const double* row) {
    const bool amsgrad = row[Column::kAmsgrad] != 0;
    return t.states[0] != nullptr && t.states[1] != nullptr && (t.states[2] != nullptr || !amsgrad);
  }
  // At a tensor's first step its moments are 0, whatever their memory holds.
  static void prepare(const PlannedTensor& t, const Elements& e, float progress) {
    for (void* moment : e.states) {
      if (progress == 0 && moment != nullptr) std::memset(moment, 0, e.size * t.state_item_size);
    }
  }
};

#define FASTFREEZE_LOOPS "cpu/step_loops.h"
#include "cpu/each_isa.h"

template <typename Rule>
using UpdateFn = void (*)(const Elements&, const TensorStep<Rule>&);

// Memory is what limits a step: wider loops gain nothing, and on AMD's Zen 4 they take 8% longer
// in fp32 and twice as long in 16 bits.
template <typename Rule>
UpdateFn<Rule> update_for(Isa isa) {
  return FASTFREEZE_OF_ISA(std::min(isa, Isa::avx2), update<Rule>);
}

template <typename Rule>
struct Plan {
  static constexpr const char* kName = Rule::kName;
  std::vector<PlannedTensor> tensors;
  float* progress;  // of each tensor, in memory that outlives the plan
  std::vector<Segment> segments;
  std::vector<int64_t> begin;  // of each group's segments, and the end
  double eta_min;
  double warmup_steps;

  int64_t num_groups() const { return static_cast<int64_t>(begin.size()) - 1; }
  GroupRate rate_at(const double* row, int64_t group, int64_t step) const {
    const SegmentTable table{segments.data(), begin.data(), eta_min, warmup_steps};
    return group_rate(table, group, row[Rule::Column::kLr], row[Rule::Column::kInitialLr], step);
  }
};

template <typename Rule>
void add_segments(Plan<Rule>& plan, const Tensor& segments, const Tensor& segment_begin) {
  check_table(segments, "segments", ScalarType::Double, 3, true);
  check_table(segment_begin, "segment_begin", ScalarType::Long, 1, true);
  STD_TORCH_CHECK(segment_begin.size(0) >= 1, "segment_begin must not be empty");
  const auto* begin = static_cast<const int64_t*>(segment_begin.data_ptr());
  plan.begin.assign(begin, begin + segment_begin.size(0));
  STD_TORCH_CHECK(plan.begin.back() == segments.size(0),
                  "segment_begin must end with the number of segments");
  STD_TORCH_CHECK(plan.begin.front() == 0 && std::is_sorted(plan.begin.begin(), plan.begin.end()),
                  "segment_begin must rise from 0");
  const auto* segment = static_cast<const Segment*>(segments.data_ptr());
  plan.segments.assign(segment, segment + segments.size(0));
}

int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// row: param, the rule's states, numel, group, dtype, dtype of the states.
PlannedTensor tensor_of(const int64_t* row, int states, int64_t groups) {
  PlannedTensor t{reinterpret_cast<char*>(*row++)};
  for (int s = 0; s < states; ++s) t.states[s] = reinterpret_cast<char*>(*row++);
  t.numel = row[0], t.group = row[1], t.dtype = static_cast<ScalarType>(row[2]);
  const auto state_dtype = static_cast<ScalarType>(row[3]);
  STD_TORCH_CHECK(t.group >= 0 && t.group < groups, "a tensor names group ", t.group);
  STD_TORCH_CHECK(t.numel >= 0, "a tensor has ", t.numel, " elements");
  t.item_size = item_size(t.dtype), t.state_item_size = item_size(state_dtype);
  t.wide_state = state_dtype != t.dtype;
  STD_TORCH_CHECK(!t.wide_state || (t.item_size == 2 && state_dtype == ScalarType::Float), "a ",
                  dtype_name(t.dtype), " parameter has a state of ", dtype_name(state_dtype));
  return t;
}

// Has the first cache lines come. Small tensors lie apart: the next one's lines would otherwise be
// asked for only when this one's are done with.
void prefetch(const void* memory) {
  for (int line = 0; line < 4; ++line) {
    __builtin_prefetch(static_cast<const char*>(memory) + 64 * line);
  }
}

// Calls update(tensor, offset) for each run of the tensors that `live` names, in as many threads as
// that is worth. Those of a network that is frozen in part cost nothing, and go to no thread.
// Before, it calls expect(tensor) for what comes next.
template <typename Expect, typename Update>
void for_each_run(const std::vector<PlannedTensor>& tensors, const std::vector<int64_t>& live,
                  const Expect& expect, const Update& update) {
  std::vector<int64_t> begin{0};  // how many elements lie before each
  begin.reserve(live.size() + 1);
  for (const int64_t t : live) begin.push_back(begin.back() + tensors[t].numel);
  const int64_t wanted = (begin.back() + kElementsPerThread - 1) / kElementsPerThread;
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(wanted, torch::stable::get_num_threads()));
  // Of equal numbers of elements; a run is in the share in which it begins.
  const auto share = [&](int64_t first, int64_t last) {
    const int64_t from = begin.back() * first / threads, to = begin.back() * last / threads;
    size_t i = std::upper_bound(begin.begin(), begin.end(), from) - begin.begin() - 1;
    for (; i < live.size() && begin[i] < to; ++i) {
      if (i + 1 < live.size()) expect(live[i + 1]);
      const int64_t skipped = std::max<int64_t>(0, from - begin[i]);
      int64_t offset = (skipped + kRunElements - 1) / kRunElements * kRunElements;
      const int64_t end = std::min(begin[i + 1], to) - begin[i];
      for (; offset < end; offset += kRunElements) update(live[i], offset);
    }
  };
  if (threads == 1) {
    share(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, share);
  }
}

template <typename Rule>
struct Operators {
  // tensors: int64 [n, kStates + 5], rows of tensor_of; progress: float32 [n, 1], which outlives
  // the plan; segments: float64 [s, 3]; segment_begin: int64 [num_groups + 1, 1].
  static int64_t plan(Tensor tensors, Tensor progress, Tensor segments, Tensor segment_begin,
                      double eta_min, int64_t warmup_steps) {
    constexpr int64_t kColumns = Rule::kStates + 5;
    check_table(tensors, "tensors", ScalarType::Long, kColumns, true);
    check_table(progress, "progress", ScalarType::Float, 1, true);
    STD_TORCH_CHECK(progress.size(0) == tensors.size(0),
                    "progress must have a row for each tensor");
    auto plan = std::make_shared<Plan<Rule>>();
    plan->progress = static_cast<float*>(progress.data_ptr());
    plan->eta_min = eta_min, plan->warmup_steps = static_cast<double>(warmup_steps);
    add_segments(*plan, segments, segment_begin);
    const auto* row = static_cast<const int64_t*>(tensors.data_ptr());
    for (int64_t i = 0; i < tensors.size(0); ++i, row += kColumns) {
      plan->tensors.push_back(tensor_of(row, Rule::kStates, plan->num_groups()));
    }
    return Handles<Plan<Rule>>::all().add(std::move(plan));
  }

  static void free(int64_t handle) { Handles<Plan<Rule>>::all().remove(handle); }

  // grads: address of int64 [n], 0 where a tensor has no gradient; hypers: address of float64
  // [num_groups, kCount]; lrs: address of float64 [num_groups], receives those of step + 1.
  static void step(int64_t handle, int64_t grads, int64_t hypers, int64_t step,
                   double inv_grad_scale, bool store_grad, int64_t lrs) {
    const std::shared_ptr<Plan<Rule>> plan = Handles<Plan<Rule>>::all().get(handle);
    const auto* grad = reinterpret_cast<const int64_t*>(grads);
    const auto row_of = [&](int64_t group) {
      return reinterpret_cast<const double*>(hypers) + group * Rule::Column::kCount;
    };
    std::vector<GroupRate> rates;
    for (int64_t g = 0; g < plan->num_groups(); ++g) {
      rates.push_back(plan->rate_at(row_of(g), g, step));
      reinterpret_cast<double*>(lrs)[g] = plan->rate_at(row_of(g), g, step + 1).lr;
    }
    std::vector<TensorStep<Rule>> steps;  // each once
    std::vector<int64_t> latest(rates.size(), -1), of_tensor(plan->tensors.size(), -1), live;
    live.reserve(plan->tensors.size());
    for (size_t i = 0; i < plan->tensors.size(); ++i) {
      const PlannedTensor& t = plan->tensors[i];
      if (grad[i] == 0 || rates[t.group].frozen) continue;
      const double* row = row_of(t.group);
      STD_TORCH_CHECK(Rule::has_states(t, row), "parameter ", i, " has a gradient and no moments");
      const float progress = plan->progress[i];
      int64_t& at = latest[t.group];
      if (at < 0 || steps[at].progress != progress) {
        at = static_cast<int64_t>(steps.size());
        steps.push_back(Rule::step(row, rates[t.group].lr, progress, inv_grad_scale, store_grad));
      }
      of_tensor[i] = at;
      if (t.numel > 0) live.push_back(static_cast<int64_t>(i));
    }
    const UpdateFn<Rule> update = update_for<Rule>(current_isa());
    const auto expect = [&](int64_t tensor) {
      prefetch(plan->tensors[tensor].param);
      prefetch(reinterpret_cast<const void*>(grad[tensor]));
      for (int s = 0; s < std::min(Rule::kStates, 2); ++s)
        prefetch(plan->tensors[tensor].states[s]);
    };
    for_each_run(plan->tensors, live, expect, [&](int64_t tensor, int64_t offset) {
      const PlannedTensor& t = plan->tensors[tensor];
      char* g = reinterpret_cast<char*>(grad[tensor]);
      const int64_t at = offset * t.item_size;
      Elements e{t.param + at, g + at,      {}, std::min(kRunElements, t.numel - offset),
                 t.dtype,      t.wide_state};
      for (int s = 0; s < Rule::kStates; ++s) {
        if (t.states[s] != nullptr) e.states[s] = t.states[s] + offset * t.state_item_size;
      }
      const TensorStep<Rule>& tensor_step = steps[of_tensor[tensor]];
      Rule::prepare(t, e, tensor_step.progress);
      update(e, tensor_step);
    });
    for (size_t i = 0; i < of_tensor.size(); ++i) {
      if (of_tensor[i] >= 0) plan->progress[i] = Rule::after_step(plan->progress[i]);
    }
  }
};

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  using Sgd = fastfreeze::Operators<fastfreeze::Sgd>;
  m.impl("sgd_plan", TORCH_BOX(&Sgd::plan));
  m.impl("sgd_step", TORCH_BOX(&Sgd::step));
  m.impl("sgd_plan_free", TORCH_BOX(&Sgd::free));
  using Adam = fastfreeze::Operators<fastfreeze::Adam>;
  m.impl("adam_plan", TORCH_BOX(&Adam::plan));
  m.impl("adam_step", TORCH_BOX(&Adam::step));
  m.impl("adam_plan_free", TORCH_BOX(&Adam::free));
}
