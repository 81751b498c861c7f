// CUDA's two 16-bit formats, with its conversions: to nearest, ties to even, one NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __int_as_float(int x) {
  float value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}

inline int __float_as_int(float x) {
  int value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}

inline float __half2float(__half x) {
  const float sign = (x.bits & 0x8000) != 0 ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
  if (exponent == 31) return fraction != 0 ? __int_as_float(0x7fffffff) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // infinite after rounding
  const int unit = size < 0x1p-14f ? -24 : std::ilogb(size) - 10;  // exponent of the last place
  const int multiple = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // A subnormal's bits are the multiple. Otherwise it has an eleventh bit that counts as one
  // exponent more, as does rounding up to the next power of two.
  return {static_cast<uint16_t>(sign | (((unit + 24) << 10) + multiple))};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  return __int_as_float(static_cast<int>(static_cast<uint32_t>(x.bits) << 16));
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto bits = static_cast<uint32_t>(__float_as_int(x));
  const uint32_t rounding = 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>((bits + rounding) >> 16)};
}
