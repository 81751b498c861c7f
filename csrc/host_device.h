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
