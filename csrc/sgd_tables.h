// What every SGD kernel reads from the tables that fastfreeze/kernels/sgd.py fills.
#pragma once

#include "schedule_math.h"
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
