// What device code shares: 16-byte loads and stores, conversions, reductions across lanes.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace fastfreeze {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__host__ __device__ __forceinline__ bool aligned16(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// N elements in registers: one, or N * sizeof(T) a multiple of 16. Index it by unrolled constants
// only.
template <typename T, int N>
struct Vec {
  static constexpr int kParts = N * static_cast<int>(sizeof(T)) / 16;
  static_assert(N == 1 || kParts * 16 == N * static_cast<int>(sizeof(T)));
  alignas(N == 1 ? alignof(T) : 16) T value[N];

  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};

// p: aligned to 16 bytes, unless N is 1.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  p = as_global(p);
  Vec<T, N> v;
  if constexpr (N == 1) v[0] = *p;
#pragma unroll
  for (int i = 0; i < v.kParts; ++i) {
    reinterpret_cast<uint4*>(&v)[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  return v;
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
  p = as_global(p);
  if constexpr (N == 1) *p = v[0];
#pragma unroll
  for (int i = 0; i < v.kParts; ++i) {
    reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&v)[i];
  }
}

// to_math: the element in the precision of the arithmetic, T being float or double.
template <typename T>
__device__ __forceinline__ T to_math(float x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ __forceinline__ T to_math(double x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ __forceinline__ T to_math(__half x) {
  return static_cast<T>(__half2float(x));
}
template <typename T>
__device__ __forceinline__ T to_math(__nv_bfloat16 x) {
  return static_cast<T>(__bfloat162float(x));
}

// from_math: rounded to nearest, ties to even.
template <typename To, typename T>
__device__ __forceinline__ To from_math(T x) {
  if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

// All kWidth lanes of a group get the reduction of their values. Every lane of the warp takes part.
template <int kWidth, typename T, typename Combine>
__device__ __forceinline__ T reduce_lanes(T value, const Combine& combine) {
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

}  // namespace fastfreeze
