// Sums of softmax over rows, included once for each instruction set (isa.h). A bad row (NaN, +inf,
// or -inf alone) comes out NaN throughout: its maximum or its sum of exponentials is.

#include "cpu/convert_loops.h"

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

// Constants of exp_of. The coefficients are minimax for |r| <= ln(2) / 2; the relative error is
// below 2^-28 (float) and 2^-57 (double) before rounding.
template <typename T>
struct Exp;

template <>
struct Exp<float> {
  using Vec = FloatVec;
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
  static constexpr float kCoefficients[] = {0.49999994f, 0.166665196f, 0.041668389f, 0.0083687678f,
                                            0.00138149306f};
};

template <>
struct Exp<double> {
  using Vec = DoubleVec;
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
  static constexpr double kCoefficients[] = {
      0.5000000000000011,     0.16666666666666421,    0.04166666666652934,    0.008333333333487212,
      0.0013888888943902257,  0.00019841269523408547, 2.4801492781600697e-05, 2.755757065444257e-06,
      2.7630370686304574e-07, 2.500519985217087e-08};
};

template <typename T>
using Vec = typename Exp<T>::Vec;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <typename T>
[[gnu::always_inline]] inline Vec<T> all(T x) {
  return Vec<T>{} + x;
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
  return __builtin_shuffle(v, typename Exp<T>::Bits{(kLane ^ kDistance)...});
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

// e^x for x <= 0 or NaN: 2^n e^r with r = x - n ln(2), e^r = 1 + r + r^2 (c[0] + c[1] r + ...).
template <typename T>
[[gnu::always_inline]] inline Vec<T> exp_of(Vec<T> x) {
  using E = Exp<T>;
  using Bits = typename E::Bits;
  constexpr int kTerms = sizeof(E::kCoefficients) / sizeof(T);
  const auto vanishes = x < E::kZeroBelow;
  x = vanishes ? Vec<T>{} : x;
  const Vec<T> rounder_and_n = mul_add(x, all(E::kLog2E), all(E::kRounder));
  const Vec<T> n = rounder_and_n - E::kRounder;
  const Vec<T> r = mul_add(n, all(-E::kLn2Low), mul_add(n, all(-E::kLn2High), x));
  Vec<T> p = all(E::kCoefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) p = mul_add(p, r, all(E::kCoefficients[i]));
  p = mul_add(p, r * r, r) + T(1);
  // The low bits of rounder_and_n are n. 2^(n + lift) is a normal number even where 2^n is not, so
  // that only the last product rounds.
  const Bits power = ((Bits)rounder_and_n + (E::kBias + E::kLift)) << E::kMantissaBits;
  return vanishes ? Vec<T>{} : p * (Vec<T>)power * E::kUnlift;
}

// The largest that is not NaN; -inf if there is none.
template <typename T>
T largest(const T* z, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> a = all(kLowest<T>), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    a = larger(load(z + i), a);
    b = larger(load(z + i + L), b);
    c = larger(load(z + i + 2 * L), c);
    d = larger(load(z + i + 3 * L), d);
  }
  for (; i + L <= n; i += L) a = larger(load(z + i), a);
  if (i < n) b = larger(load_first(z + i, n - i, kLowest<T>), b);
  return reduced<T>(larger(larger(a, b), larger(c, d)), larger<Vec<T>>);
}

// e = exp(z - top), filled up with zeros to whole vectors; the sum. e may be z. `ahead` is what
// will be read next: rows are too short for the hardware to foresee it.
template <typename T, typename In>
T exp_minus(const T* z, T top, T* e, int64_t n, const In* ahead) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    __builtin_prefetch(ahead + i);
    __builtin_prefetch(ahead + i + L);
    const Vec<T> x = exp_of<T>(load(z + i) - top);
    const Vec<T> y = exp_of<T>(load(z + i + L) - top);
    store(e + i, x);
    store(e + i + L, y);
    a += x;
    b += y;
  }
  for (; i < n; i += L) {
    const Vec<T> last = n - i < L ? load_first(z + i, n - i, kLowest<T>) : load(z + i);
    const Vec<T> x = exp_of<T>(last - top);
    store(e + i, x);
    a += x;
  }
  return reduced<T>(a + b, added<Vec<T>>);
}

// out = before + the sum over rows of scale * e, rows being `pitch` apart in e; `before` may be
// out, or null for zeros.
template <typename T>
void combine(const T* before, const T* e, int64_t pitch, const T* scales, int64_t rows, T* out,
             int64_t n) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = 0;
  const auto sum_from = [&](Vec<T> sum) __attribute__((always_inline)) {
    for (int64_t k = 0; k < rows; ++k) {
      sum = mul_add(load(e + k * pitch + i), all(scales[k]), sum);
    }
    return sum;
  };
  for (; i + L <= n; i += L) {
    store(out + i, sum_from(before == nullptr ? Vec<T>{} : load(before + i)));
  }
  if (i < n) {
    const Vec<T> first = before == nullptr ? Vec<T>{} : load_first(before + i, n - i, T(0));
    store_first(out + i, sum_from(first), n - i);
  }
}

template <typename T>
constexpr int64_t padded(int64_t classes) {
  return (classes + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// The rows of a job in its types.
template <typename T, typename In, typename Out>
struct TypedRows {
  const SoftmaxJob& job;

  int64_t members() const { return static_cast<int64_t>(job.members.size()); }
  T share() const { return static_cast<T>(job.share); }
  const In* member(int64_t m, int64_t row) const {
    return static_cast<const In*>(job.members[m].data) + row * job.members[m].stride;
  }
  const T* before(int64_t row) const {
    return job.before == nullptr ? nullptr : static_cast<const T*>(job.before) + row * job.classes;
  }
  Out* out(int64_t row) const { return static_cast<Out*>(job.out) + row * job.classes; }

  // Where the sum of a row grows, `room` unless that can be the output; finish() rounds it there.
  T* sum(int64_t row, T* room) const {
    if constexpr (std::is_same_v<T, Out>) return out(row);
    return room;
  }
  void finish(const T* sum, int64_t row, int64_t n) const {
    if constexpr (!std::is_same_v<T, Out>) from_float(sum, out(row), n);
  }
};

// Elements to calculate with: 16-bit ones become fp32 in `room`, others are used where they are.
template <typename T, typename In>
const T* widened(const In* src, T* room, int64_t n) {
  if constexpr (std::is_same_v<T, In>) {
    return src;
  } else {
    to_float(src, room, n);
    return room;
  }
}

// Few classes: up to kLanes rows at once, a row to a lane.
template <typename T, typename In, typename Out>
void narrow_rows(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  const int64_t C = rows.job.classes;
  alignas(64) T room[kNarrow * L], tile[kNarrow * L] = {}, total[kNarrow * L] = {};
  const auto transpose = [&](const T* row, int64_t l, T* to) {
    for (int64_t c = 0; c < C; ++c) to[c * L + l] = row[c];
  };
  for (int64_t l = 0; l < count && rows.job.before != nullptr; ++l) {
    transpose(rows.before(begin + l), l, total);
  }
  for (int64_t m = 0; m < rows.members(); ++m) {
    for (int64_t l = 0; l < count; ++l) {
      transpose(widened(rows.member(m, begin + l), room, C), l, tile);
    }
    Vec<T> top = load(tile);
    for (int64_t c = 1; c < C; ++c) top = larger(load(tile + c * L), top);
    Vec<T> sum = {};
    for (int64_t c = 0; c < C; ++c) {
      const Vec<T> e = exp_of<T>(load(tile + c * L) - top);
      store(tile + c * L, e);
      sum += e;
    }
    const Vec<T> scale = rows.share() / sum;
    for (int64_t c = 0; c < C; ++c) {
      store(total + c * L, mul_add(load(tile + c * L), scale, load(total + c * L)));
    }
  }
  T* sums = rows.sum(begin, room);
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t c = 0; c < C; ++c) sums[l * C + c] = total[c * L + l];
  }
  rows.finish(sums, begin, count * C);
}

// Rows of up to kBlock classes, some rows and members at a time: what one waits for (reductions, a
// division) overlaps with the others' work. e holds kGroupElements, or a row; room a row.
template <typename T, typename In, typename Out>
void grouped_rows(const TypedRows<T, In, Out>& rows, int64_t begin, int64_t end, T* e, T* room) {
  const int64_t C = rows.job.classes, pitch = padded<T>(C), M = rows.members();
  const int64_t fitting = std::clamp<int64_t>(kGroupElements / pitch, 1, kGroup);
  const int64_t some_members = std::min(fitting, M);
  const int64_t some_rows = std::max<int64_t>(1, fitting / M);
  T tops[kGroup], scales[kGroup];
  for (int64_t r = begin; r < end; r += some_rows) {
    const int64_t num_rows = std::min(some_rows, end - r);
    for (int64_t m = 0; m < M; m += some_members) {
      const int64_t num_members = std::min(some_members, M - m);
      const int64_t count = num_rows * num_members;
      const auto logits = [&](int64_t i, int64_t rows_on) {
        return rows.member(m + i % num_members, r + i / num_members + rows_on);
      };
      for (int64_t i = 0; i < count; ++i) {
        tops[i] = largest(widened(logits(i, 0), e + i * pitch, C), C);
      }
      for (int64_t i = 0; i < count; ++i) {
        T* to = e + i * pitch;
        const T* z = to;
        if constexpr (std::is_same_v<T, In>) z = logits(i, 0);
        scales[i] = rows.share() / exp_minus(z, tops[i], to, C, logits(i, num_rows));
      }
      for (int64_t i = 0; i < num_rows; ++i) {
        T* sum = rows.sum(r + i, room);
        const int64_t first = i * num_members;
        combine(m == 0 ? rows.before(r + i) : sum, e + first * pitch, pitch, scales + first,
                num_members, sum, C);
        if (m + num_members == M) rows.finish(sum, r + i, C);
      }
    }
  }
}

// out = before + share * softmax(z) for a long row, in blocks: sums of blocks are accurate, and
// memory is read once, for each block keeps its own maximum until the row's is known.
template <typename T, typename In>
void add_long_row(const In* z, int64_t classes, T share, const T* before, T* out, T* e, T* tops) {
  const auto relative = [](T top, T highest) {  // both may be the same infinity
    return top == highest ? 1.0 : std::exp(static_cast<double>(top) - highest);
  };
  T highest = kLowest<T>;
  double sum = 0;
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int64_t size = std::min(kBlock, classes - at);
    const T* block = widened(z + at, e + at, size);
    const T top = largest(block, size);
    const T origin = top == kLowest<T> ? T(0) : top;  // a block may be masked throughout
    const double block_sum = exp_minus(block, origin, e + at, size, z + at + kBlock);
    const T before_highest = highest;
    highest = larger(top, highest);
    sum = sum * relative(before_highest, highest) + block_sum * relative(top, highest);
    tops[at / kBlock] = top;
  }
  for (int64_t at = 0; at < classes; at += kBlock) {
    const T scale = static_cast<T>(share * relative(tops[at / kBlock], highest) / sum);
    combine(before == nullptr ? nullptr : before + at, e + at, 0, &scale, 1, out + at,
            std::min(kBlock, classes - at));
  }
}

template <typename T, typename In, typename Out>
void softmax_rows_typed(const SoftmaxJob& job, int64_t begin, int64_t end) {
  const TypedRows<T, In, Out> rows{job};
  const int64_t C = job.classes;
  if (C <= kNarrow) {
    for (int64_t r = begin; r < end; r += kLanes<T>) {
      narrow_rows(rows, r, std::min(kLanes<T>, end - r));
    }
    return;
  }
  AlignedArray<T> e(std::max(kGroupElements, padded<T>(C))), room(C);
  if (C <= kBlock) return grouped_rows(rows, begin, end, e.data(), room.data());
  AlignedArray<T> tops((C + kBlock - 1) / kBlock);
  for (int64_t r = begin; r < end; ++r) {
    T* sum = rows.sum(r, room.data());
    for (int64_t m = 0; m < rows.members(); ++m) {
      add_long_row(rows.member(m, r), C, rows.share(), m == 0 ? rows.before(r) : sum, sum, e.data(),
                   tops.data());
    }
    rows.finish(sum, r, C);
  }
}

template <typename In>
void softmax_rows16(const SoftmaxJob& job, int64_t begin, int64_t end) {
  if (job.out_dtype == ScalarType::Float) {
    return softmax_rows_typed<float, In, float>(job, begin, end);
  }
  return softmax_rows_typed<float, In, In>(job, begin, end);
}

inline void softmax_rows(const SoftmaxJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case ScalarType::Float:
      return softmax_rows_typed<float, float, float>(job, begin, end);
    case ScalarType::Double:
      return softmax_rows_typed<double, double, double>(job, begin, end);
    case ScalarType::Half:
      return softmax_rows16<c10::Half>(job, begin, end);
    default:
      return softmax_rows16<c10::BFloat16>(job, begin, end);
  }
}
