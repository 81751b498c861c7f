// What code for the host and for devices is written with.
#pragma once

#ifdef __CUDACC__
#define FASTFREEZE_HOST_DEVICE __host__ __device__
#else
#define FASTFREEZE_HOST_DEVICE
#endif

#define FASTFREEZE_INLINE inline __attribute__((always_inline))

namespace fastfreeze {

// A pointer read from a table is generic until a device's compiler knows better.
template <typename T>
FASTFREEZE_HOST_DEVICE inline T* as_global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

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
