// The Adam and AdamW update of one element: the only place where the formula stands.
// It is torch.optim.Adam's, with one division where that has two: the bias corrections are in
// `step_size` and `eps`.
#pragma once

#include <cmath>

#include "element_math.h"

namespace fastfreeze {

// What is constant for all elements of a parameter at one step, in the precision of the arithmetic.
template <typename T>
struct AdamHyper {
  T decay;         // what the parameter is multiplied by first
  T weight_decay;  // what of the parameter is added to the gradient
  // Of the way from exp_avg to the gradient, 1 - beta1; or, to be exact where beta1 is small, of
  // the way from the gradient on: -beta1.
  T mean_share;
  T beta2;
  T square_share;  // 1 - beta2
  T step_size;     // lr sqrt(1 - beta2^k) / (1 - beta1^k) at the parameter's step k
  T eps;           // eps sqrt(1 - beta2^k)
  T inv_grad_scale;
  T sign;  // of the gradient: -1 to maximize
};

// As torch.maximum: NaN if one of them is.
template <typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE T larger_or_nan(T a, T b) {
  return a >= b || a != a ? a : b;
}

// Updates `param` and its moments; `grad` becomes the unscaled gradient. Before a parameter's first
// step its moments are 0: the caller sees to that.
template <bool kAmsgrad, bool kFused, typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE void adam_update(T& param, T& grad, T& exp_avg,
                                                          T& exp_avg_sq, T& max_exp_avg_sq,
                                                          const AdamHyper<T>& h) {
  grad *= h.inv_grad_scale;
  T d = h.sign * grad;
  if (h.weight_decay != 0) d = mul_add<kFused>(param, h.weight_decay, d);
  exp_avg = mul_add<kFused>(h.mean_share, d - exp_avg, h.mean_share <= 0 ? d : exp_avg);
  exp_avg_sq = mul_add<kFused>(d * h.square_share, d, exp_avg_sq * h.beta2);
  if (kAmsgrad) max_exp_avg_sq = larger_or_nan(max_exp_avg_sq, exp_avg_sq);
  const T root = std::sqrt(kAmsgrad ? max_exp_avg_sq : exp_avg_sq);
  param = mul_add<kFused>(param, h.decay, -h.step_size * exp_avg / (root + h.eps));
}

}  // namespace fastfreeze
