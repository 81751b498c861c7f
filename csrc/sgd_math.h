// SGD's hyperparameters, and the update of one element: the only place where the formula stands.
// Operation for operation torch.optim.SGD's for-loop: each of torch's in-place additions with a
// factor is one fused multiply-add there too, so fp32 and fp64 results can be equal bit for bit.
#pragma once

#include "host_device.h"

namespace fastfreeze {

// Columns of a group's row of hyperparameters: the hypers of SGD in fastfreeze/kernels/rules.py.
struct SgdColumn {
  enum { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kInitialLr, kCount };
};

// What the momentum buffer is at this step. A buffer's first step copies the gradient, undampened.
enum class Momentum { none, first, running };

// One group's hyperparameters in the precision of the arithmetic.
template <typename T>
struct SgdHyper {
  T lr;
  T momentum;
  T gradient_share;  // 1 - dampening
  T weight_decay;
  T inv_grad_scale;
  bool nesterov;
  bool maximize;
};

template <typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE SgdHyper<T> sgd_hyper_of(const double* row, double lr,
                                                                  double inv_grad_scale) {
  SgdHyper<T> h;
  h.lr = static_cast<T>(lr);
  h.momentum = static_cast<T>(row[SgdColumn::kMomentum]);
  h.gradient_share = static_cast<T>(1.0 - row[SgdColumn::kDampening]);
  h.weight_decay = static_cast<T>(row[SgdColumn::kWeightDecay]);
  h.inv_grad_scale = static_cast<T>(inv_grad_scale);
  h.nesterov = row[SgdColumn::kNesterov] != 0;
  h.maximize = row[SgdColumn::kMaximize] != 0;
  return h;
}

// Updates `param` and `buffer`; `grad` becomes the unscaled gradient.
template <Momentum kMomentum, bool kFused, typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE void sgd_update(T& param, T& grad, T& buffer,
                                                         const SgdHyper<T>& h) {
  grad *= h.inv_grad_scale;
  T d = h.maximize ? -grad : grad;
  if (h.weight_decay != 0) d = mul_add<kFused>(param, h.weight_decay, d);
  if (kMomentum != Momentum::none) {
    buffer = kMomentum == Momentum::first
                 ? d
                 : mul_add<kFused>(d, h.gradient_share, buffer * h.momentum);
    d = h.nesterov ? mul_add<kFused>(buffer, h.momentum, d) : buffer;
  }
  param = mul_add<kFused>(d, -h.lr, param);
}

}  // namespace fastfreeze
