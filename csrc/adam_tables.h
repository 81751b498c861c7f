// What every Adam kernel reads from the tables that Python fills.
#pragma once

#include "adam_math.h"
#include "schedule_math.h"

namespace fastfreeze {

// Columns of a group's row of hyperparameters.
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

}  // namespace fastfreeze
