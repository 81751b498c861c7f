// Hyperparameters of Adam and AdamW, and the update of one element: the only place where the
// formula stands.
// It is torch.optim.Adam's, with one division where that has two: the bias corrections are in
// `step_size` and `eps`.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastfreeze {

// Columns of a group's row of hyperparameters: those of ADAM in fastfreeze/kernels/rules.py.
struct AdamColumn {
  enum {
    kLr,
    kBeta1,
    kBeta2,
    kEps,
    kWeightDecay,
    kDecoupled,
    kMaximize,
    kAmsgrad,
    kInitialLr,
    kCount
  };
};

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

// 1 - beta1^k, and the root of 1 - beta2^k.
struct BiasCorrection {
  double mean;
  double root;
};

// beta^k of a whole k >= 0.
FASTFREEZE_HOST_DEVICE inline double power(double beta, double k) {
#ifdef __CUDA_ARCH__
  double result = 1.0;  // by squaring: pow would take many more registers
  for (auto n = static_cast<unsigned>(k); n != 0; n >>= 1, beta *= beta) {
    if (n & 1) result *= beta;
  }
  return result;
#else
  return std::pow(beta, k);
#endif
}

// k: the parameter's steps, this one included.
FASTFREEZE_HOST_DEVICE inline BiasCorrection bias_correction(const double* row, double k) {
  return {1.0 - power(row[AdamColumn::kBeta1], k),
          std::sqrt(1.0 - power(row[AdamColumn::kBeta2], k))};
}

template <typename T>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE AdamHyper<T> adam_hyper_of(const double* row, double lr,
                                                                    const BiasCorrection& bias,
                                                                    double inv_grad_scale) {
  const double weight_decay = row[AdamColumn::kWeightDecay];
  const bool decoupled = row[AdamColumn::kDecoupled] != 0;
  const double mean_share = 1.0 - row[AdamColumn::kBeta1];
  AdamHyper<T> h;
  h.mean_share = static_cast<T>(mean_share < 0.5 ? mean_share : -row[AdamColumn::kBeta1]);
  h.beta2 = static_cast<T>(row[AdamColumn::kBeta2]);
  h.square_share = static_cast<T>(1.0 - row[AdamColumn::kBeta2]);
  h.decay = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
  h.weight_decay = static_cast<T>(decoupled ? 0.0 : weight_decay);
  h.step_size = static_cast<T>(lr * bias.root / bias.mean);
  h.eps = static_cast<T>(row[AdamColumn::kEps] * bias.root);
  h.inv_grad_scale = static_cast<T>(inv_grad_scale);
  h.sign = static_cast<T>(row[AdamColumn::kMaximize] != 0 ? -1.0 : 1.0);
  return h;
}

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
