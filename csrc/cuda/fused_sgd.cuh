// SGD as a rule of step.cuh.
#pragma once

#include "cuda/step.cuh"
#include "sgd_math.h"

namespace fastfreeze {

using SgdTables = StepTables<1, SgdColumn::kCount, uint8_t>;

// What a run's step depends on beside its elements. M: the momentum buffers' type.
template <typename P_, typename M_>
struct SgdRule {
  using P = P_;
  using M = M_;
  using T = MathOf<P>;
  using Tables = SgdTables;
  static constexpr int kStates = 1;
  static constexpr int kUnroll = sizeof(P) == 2 ? 2 : 4;  // 16-bit elements take twice their room
  // On a multiprocessor at least: 96 registers a thread, or 128. Four have 98 KB on their way to
  // it, twice what an H200 needs.
  static constexpr int kBlocks = sizeof(P) == 2 ? 5 : 4;

  SgdHyper<T> hyper;
  Momentum momentum;
  bool frozen;

  // All that one load tells where to find is asked for before the schedule is worked out.
  static __device__ __forceinline__ SgdRule of(const Tables& tables, const StepCall& call,
                                               const Run<kStates>& run, int64_t step) {
    const double* row = tables.hypers_of(run.group);
    const bool first = run.state[0] != 0 && tables.progress[run.tensor] == 0;
    SgdRule rule{sgd_hyper_of<T>(row, 0.0, inverse_of(call.grad_scale)), Momentum::running, false};
    const GroupRate rate = group_rate(tables.segments, run.group, row[SgdColumn::kLr],
                                      row[SgdColumn::kInitialLr], step);
    rule.hyper.lr = static_cast<T>(rate.lr);
    rule.frozen = rate.frozen;
    if (first) rule.momentum = Momentum::first;
    if (run.state[0] == 0) rule.momentum = Momentum::none;
    return rule;
  }

  template <Momentum kMomentum>
  struct Kind {
    static constexpr int kStates = kMomentum == Momentum::none ? 0 : 1;
    static __device__ __forceinline__ void update(T& p, T& g, T (&buffer)[1], const SgdRule& rule) {
      sgd_update<kMomentum, true>(p, g, buffer[0], rule.hyper);
    }
  };

  template <typename Body>
  __device__ __forceinline__ void with_kind(const Body& body) const {
    if (momentum == Momentum::none) {
      body(Kind<Momentum::none>{});
    } else if (momentum == Momentum::first) {
      body(Kind<Momentum::first>{});
    } else {
      body(Kind<Momentum::running>{});
    }
  }
};

}  // namespace fastfreeze
