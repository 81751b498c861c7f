// Adam and AdamW as a rule of step.cuh.
#pragma once

#include "adam_math.h"
#include "cuda/step.cuh"

namespace fastfreeze {

using AdamTables = StepTables<3, AdamColumn::kCount, float>;

// What a run's step depends on beside its elements. M: the moments' type.
template <typename P_, typename M_>
struct AdamRule {
  using P = P_;
  using M = M_;
  using T = MathOf<P>;
  using Tables = AdamTables;
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  // Two vectors of each tensor, of 16-bit ones beside fp32 moments one, and 128 registers a thread,
  // or 96: each multiprocessor has 60 KB or more on their way to it, and nothing spills.
  static constexpr bool kWide = sizeof(M) > sizeof(P);
  static constexpr int kUnroll = kWide ? 1 : 2;
  static constexpr int kBlocks = kWide ? 5 : 4;

  AdamHyper<T> hyper;
  bool first;  // the moments are 0, whatever is in their memory
  bool amsgrad;
  bool frozen;

  // As of SGD's rule. The tensor's steps count this one too.
  static __device__ __forceinline__ AdamRule of(const Tables& tables, const StepCall& call,
                                                const Run<kStates>& run, int64_t step) {
    const double* row = tables.hypers_of(run.group);
    const double steps = static_cast<double>(tables.progress[run.tensor]);
    const double inverse = inverse_of(call.grad_scale);
    const GroupRate rate = group_rate(tables.segments, run.group, row[AdamColumn::kLr],
                                      row[AdamColumn::kInitialLr], step);
    const BiasCorrection bias = bias_correction(row, steps + 1);
    return {adam_hyper_of<T>(row, rate.lr, bias, inverse), steps == 0, run.state[2] != 0,
            rate.frozen};
  }

  template <bool kAmsgrad>
  struct Kind {
    static constexpr int kStates = kAmsgrad ? 3 : 2;
    static __device__ __forceinline__ void update(T& p, T& g, T (&moments)[3],
                                                  const AdamRule& rule) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) moments[s] = rule.first ? T(0) : moments[s];
      adam_update<kAmsgrad, true>(p, g, moments[0], moments[1], moments[2], rule.hyper);
    }
  };

  template <typename Body>
  __device__ __forceinline__ void with_kind(const Body& body) const {
    if (amsgrad) {
      body(Kind<true>{});
    } else {
      body(Kind<false>{});
    }
  }
};

}  // namespace fastfreeze
