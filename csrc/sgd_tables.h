// What every SGD kernel reads from the tables that fastfreeze/ops/sgd.py fills.
#pragma once

#include "sgd_math.h"

namespace fastfreeze {

// Columns of a group's row of hyperparameters.
enum HyperColumn {
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kNesterov,
  kMaximize,
  kInitialLr,
  kHyperColumns
};

// The segments of all groups; those of group g are begin[g] .. begin[g + 1]. None: no schedule.
struct SegmentTable {
  const Segment* segments;
  const int64_t* begin;
  double eta_min;
  double warmup_steps;
};

struct GroupRate {
  double lr;
  bool frozen;
};

FASTFREEZE_HOST_DEVICE inline const Segment* segment_of(const SegmentTable& table, int64_t group,
                                                        double step) {
  const int64_t begin = table.begin[group];
  const int64_t count = table.begin[group + 1] - begin;
  return count == 0 ? nullptr : &segment_at(table.segments + begin, count, step);
}

FASTFREEZE_HOST_DEVICE inline bool group_frozen(const SegmentTable& table, int64_t group,
                                                int64_t step) {
  const Segment* segment = segment_of(table, group, static_cast<double>(step));
  return segment != nullptr && segment->length == 0;
}

FASTFREEZE_HOST_DEVICE inline GroupRate group_rate(const SegmentTable& table, int64_t group,
                                                   const double* hyper_row, int64_t step) {
  const double at = static_cast<double>(step);
  const Segment* segment = segment_of(table, group, at);
  if (segment == nullptr) return {hyper_row[kLr], false};
  const double lr =
      segment_lr(*segment, at, hyper_row[kInitialLr], table.eta_min, table.warmup_steps);
  return {lr, segment->length == 0};
}

template <typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE SgdHyper<T> hyper_of(const double* row, double lr,
                                                              double inv_grad_scale) {
  SgdHyper<T> h;
  h.lr = static_cast<T>(lr);
  h.momentum = static_cast<T>(row[kMomentum]);
  h.gradient_share = static_cast<T>(1.0 - row[kDampening]);
  h.weight_decay = static_cast<T>(row[kWeightDecay]);
  h.inv_grad_scale = static_cast<T>(inv_grad_scale);
  h.nesterov = row[kNesterov] != 0;
  h.maximize = row[kMaximize] != 0;
  return h;
}

}  // namespace fastfreeze
