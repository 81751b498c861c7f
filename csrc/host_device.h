// What code for the host and for devices is written with.
#pragma once

#ifdef __CUDACC__
#define FASTFREEZE_HOST_DEVICE __host__ __device__
#else
#define FASTFREEZE_HOST_DEVICE
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FASTFREEZE_INLINE inline __attribute__((always_inline))
#else
#define FASTFREEZE_INLINE inline
#endif

namespace fastfreeze {

// A pointer read from a table is generic until a device's compiler knows better.
template <typename T>
FASTFREEZE_HOST_DEVICE inline T* as_global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

}  // namespace fastfreeze
