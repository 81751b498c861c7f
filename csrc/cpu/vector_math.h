// Vectors of floats and doubles, and their exponential and logarithm, included once for each
// instruction set (isa.h).

#if FASTFREEZE_ISA_LEVEL == 2
constexpr int kVectorBytes = 64;
#elif FASTFREEZE_ISA_LEVEL == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));
typedef uint64_t DoubleBits __attribute__((vector_size(kVectorBytes)));

// Constants of exp_of and log_of. The coefficients are minimax: for |r| <= ln(2) / 2 with a
// relative error below 2^-28 (float) and 2^-57 (double) before rounding, and for 1 + f from
// sqrt(1/2) to sqrt(2) below 2^-30 and 2^-59.
template <typename T>
struct Real;

template <>
struct Real<float> {
  using Vec = FloatVec;
  using Word = uint32_t;
  using Bits = FloatBits;
  static constexpr float kZeroBelow = -104.0f;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // so short that an integer times it is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRounder = 0x1.8p23f;  // added and taken away again: an integer is left
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr int kLift = 64;
  static constexpr float kUnlift = 0x1p-64f;
  static constexpr float kExp[] = {0.49999994f, 0.166665196f, 0.041668389f, 0.0083687678f,
                                   0.00138149306f};
  static constexpr float kLog[] = {0.66666776f, 0.3997754f, 0.29871836f};
  static constexpr uint32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr uint32_t kOne = 0x3f800000;       // bits of 1
};

template <>
struct Real<double> {
  using Vec = DoubleVec;
  using Word = uint64_t;
  using Bits = DoubleBits;
  static constexpr double kZeroBelow = -746.0;
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0.693145751953125;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr int kLift = 512;
  static constexpr double kUnlift = 0x1p-512;
  static constexpr double kExp[] = {
      0.5000000000000011,     0.16666666666666421,    0.04166666666652934,    0.008333333333487212,
      0.0013888888943902257,  0.00019841269523408547, 2.4801492781600697e-05, 2.755757065444257e-06,
      2.7630370686304574e-07, 2.500519985217087e-08};
  static constexpr double kLog[] = {0.6666666666666734,  0.39999999999414565, 0.2857142874242988,
                                    0.22222198567504825, 0.1818356468006091,  0.1531404017959013,
                                    0.14796065351913607};
  static constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr uint64_t kOne = 0x3ff0000000000000;
};

template <typename T>
using Vec = typename Real<T>::Vec;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <typename T>
[[gnu::always_inline]] inline Vec<T> all(T x) {
  return x - Vec<T>{};  // unlike a sum, no instruction of its own
}

template <typename T>
[[gnu::always_inline]] inline Vec<T> load(const T* src) {
  Vec<T> v;
  std::memcpy(&v, src, sizeof(v));
  return v;
}

template <typename T>
[[gnu::always_inline]] inline void store(T* dst, Vec<T> v) {
  std::memcpy(dst, &v, sizeof(v));
}

// mul_add: a * b + c. load_first, store_first: the first n lanes, 0 < n < kLanes, from and to
// memory; load_first sets the others to `rest`.
#if FASTFREEZE_ISA_LEVEL == 2
[[gnu::always_inline]] inline FloatVec mul_add(FloatVec a, FloatVec b, FloatVec c) {
  return _mm512_fmadd_ps(a, b, c);
}
[[gnu::always_inline]] inline DoubleVec mul_add(DoubleVec a, DoubleVec b, DoubleVec c) {
  return _mm512_fmadd_pd(a, b, c);
}
[[gnu::always_inline]] inline FloatVec load_first(const float* src, int64_t n, float rest) {
  return _mm512_mask_loadu_ps(all(rest), static_cast<__mmask16>((1u << n) - 1), src);
}
[[gnu::always_inline]] inline DoubleVec load_first(const double* src, int64_t n, double rest) {
  return _mm512_mask_loadu_pd(all(rest), static_cast<__mmask8>((1u << n) - 1), src);
}
[[gnu::always_inline]] inline void store_first(float* dst, FloatVec v, int64_t n) {
  _mm512_mask_storeu_ps(dst, static_cast<__mmask16>((1u << n) - 1), v);
}
[[gnu::always_inline]] inline void store_first(double* dst, DoubleVec v, int64_t n) {
  _mm512_mask_storeu_pd(dst, static_cast<__mmask8>((1u << n) - 1), v);
}
#elif FASTFREEZE_ISA_LEVEL == 1
[[gnu::always_inline]] inline FloatVec mul_add(FloatVec a, FloatVec b, FloatVec c) {
  return _mm256_fmadd_ps(a, b, c);
}
[[gnu::always_inline]] inline DoubleVec mul_add(DoubleVec a, DoubleVec b, DoubleVec c) {
  return _mm256_fmadd_pd(a, b, c);
}
[[gnu::always_inline]] inline __m256i first_floats(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
[[gnu::always_inline]] inline __m256i first_doubles(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
[[gnu::always_inline]] inline FloatVec load_first(const float* src, int64_t n, float rest) {
  const __m256i mask = first_floats(n);
  return _mm256_blendv_ps(all(rest), _mm256_maskload_ps(src, mask), _mm256_castsi256_ps(mask));
}
[[gnu::always_inline]] inline DoubleVec load_first(const double* src, int64_t n, double rest) {
  const __m256i mask = first_doubles(n);
  return _mm256_blendv_pd(all(rest), _mm256_maskload_pd(src, mask), _mm256_castsi256_pd(mask));
}
[[gnu::always_inline]] inline void store_first(float* dst, FloatVec v, int64_t n) {
  _mm256_maskstore_ps(dst, first_floats(n), v);
}
[[gnu::always_inline]] inline void store_first(double* dst, DoubleVec v, int64_t n) {
  _mm256_maskstore_pd(dst, first_doubles(n), v);
}
#else
[[gnu::always_inline]] inline FloatVec mul_add(FloatVec a, FloatVec b, FloatVec c) {
  return a * b + c;
}
[[gnu::always_inline]] inline DoubleVec mul_add(DoubleVec a, DoubleVec b, DoubleVec c) {
  return a * b + c;
}
[[gnu::always_inline]] inline FloatVec load_first(const float* src, int64_t n, float rest) {
  return FloatVec{src[0], n > 1 ? src[1] : rest, n > 2 ? src[2] : rest, rest};
}
[[gnu::always_inline]] inline DoubleVec load_first(const double* src, int64_t, double rest) {
  return DoubleVec{src[0], rest};
}
[[gnu::always_inline]] inline void store_first(float* dst, FloatVec v, int64_t n) {
  dst[0] = v[0];
  if (n > 1) dst[1] = v[1];
  if (n > 2) dst[2] = v[2];
}
[[gnu::always_inline]] inline void store_first(double* dst, DoubleVec v, int64_t) { dst[0] = v[0]; }
#endif

// A NaN in `a` is passed over.
template <typename V>
[[gnu::always_inline]] inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
[[gnu::always_inline]] inline V added(V a, V b) {
  return a + b;
}

template <typename T, int kDistance, std::size_t... kLane>
[[gnu::always_inline]] inline Vec<T> swapped(Vec<T> v, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, static_cast<int>(kLane ^ kDistance)...);
#else
  return __builtin_shuffle(v, typename Real<T>::Bits{(kLane ^ kDistance)...});
#endif
}

// All lanes in one number.
template <typename T, int kDistance = kLanes<T> / 2, typename Combine>
[[gnu::always_inline]] inline T reduced(Vec<T> v, const Combine& combine) {
  v = combine(v, swapped<T, kDistance>(v, std::make_index_sequence<kLanes<T>>()));
  if constexpr (kDistance == 1) {
    return v[0];
  } else {
    return reduced<T, kDistance / 2>(v, combine);
  }
}

// c[0] + c[1] x + c[2] x^2 + ...
template <typename T, std::size_t kTerms>
[[gnu::always_inline]] inline Vec<T> polynomial(const T (&c)[kTerms], Vec<T> x) {
  Vec<T> p = all(c[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = static_cast<int>(kTerms) - 2; i >= 0; --i) p = mul_add(p, x, all(c[i]));
  return p;
}

// e^x for x <= 0 or NaN: 2^n e^r with r = x - n ln(2), e^r = 1 + r + r^2 (c[0] + c[1] r + ...).
template <typename T>
[[gnu::always_inline]] inline Vec<T> exp_of(Vec<T> x) {
  using R = Real<T>;
  using Bits = typename R::Bits;
  const auto vanishes = x < R::kZeroBelow;
  x = vanishes ? Vec<T>{} : x;
  const Vec<T> rounder_and_n = mul_add(x, all(R::kLog2E), all(R::kRounder));
  const Vec<T> n = rounder_and_n - R::kRounder;
  const Vec<T> r = mul_add(n, all(-R::kLn2Low), mul_add(n, all(-R::kLn2High), x));
  const Vec<T> p = mul_add(polynomial(R::kExp, r), r * r, r) + T(1);
  // The low bits of rounder_and_n are n. 2^(n + lift) is a normal number even where 2^n is not, so
  // that only the last product rounds.
  const Bits power = ((Bits)rounder_and_n + (R::kBias + R::kLift)) << R::kMantissaBits;
  return vanishes ? Vec<T>{} : p * (Vec<T>)power * R::kUnlift;
}

// log(x) for a finite normal x > 0, or NaN: k ln(2) + log(1 + f) with 1 + f from sqrt(1/2) to
// sqrt(2), and log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + z (c[0] + c[1] z + ...)) with
// s = f / (2 + f), z = s^2: the terms of 2 atanh(s), so ordered that the largest is exact.
template <typename T>
[[gnu::always_inline]] inline Vec<T> log_of(Vec<T> x) {
  using R = Real<T>;
  using Bits = typename R::Bits;
  constexpr auto kMantissa = (decltype(R::kOne){1} << R::kMantissaBits) - 1;
  const Bits shifted = (Bits)x + (R::kOne - R::kSqrtHalf);
  const Vec<T> rounder = all(R::kRounder);
  const Bits rounder_and_k = (Bits)rounder + (shifted >> R::kMantissaBits);
  const Vec<T> k = (Vec<T>)rounder_and_k - (R::kRounder + R::kBias);
  const Vec<T> f = (Vec<T>)((shifted & kMantissa) + R::kSqrtHalf) - T(1);
  const Vec<T> s = f / (f + T(2));
  const Vec<T> z = s * s;
  const Vec<T> half_square = T(0.5) * f * f;
  const Vec<T> rest = mul_add(z, polynomial(R::kLog, z), half_square);
  const Vec<T> low = half_square - mul_add(s, rest, k * R::kLn2Low);
  return mul_add(k, all(R::kLn2High), f - low) + (x - x);
}
