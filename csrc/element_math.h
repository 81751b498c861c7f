// What the formulas of elements are written with.
#pragma once

#include "host_device.h"

namespace fastfreeze {

// kFused: the target has a multiply-add instruction. Without one, emulating it in software would
// cost more than a whole update, and torch does not either.
template <bool kFused>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE float mul_add(float a, float b, float c) {
  return kFused ? __builtin_fmaf(a, b, c) : a * b + c;
}

template <bool kFused>
FASTFREEZE_HOST_DEVICE FASTFREEZE_INLINE double mul_add(double a, double b, double c) {
  return kFused ? __builtin_fma(a, b, c) : a * b + c;
}

}  // namespace fastfreeze
