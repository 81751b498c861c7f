// What is done with a row of logits, included once for each instruction set (isa.h). Throughout,
// x = (z - top) / temperature for a logit z.

#include "cpu/vector_math.h"

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

// Sum of e^x, and of e^x x if wanted: log(exp) - product / exp is the entropy.
template <typename T>
struct Sums {
  T exp = 0;
  T product = 0;
};

// product + e x, where e = e^x may be 0 and x = -inf.
template <typename T>
[[gnu::always_inline]] inline Vec<T> add_product(Vec<T> e, Vec<T> x, Vec<T> product) {
  return mul_add(e, larger(x, all(Real<T>::kZeroBelow)), product);
}

// e = e^x, filled up with zeros to whole vectors; the sums. e may be z. `ahead` is what will be
// read next: rows are too short for the hardware to foresee it.
template <bool kProduct, typename T, typename In>
Sums<T> exponentials(const T* z, T top, T inverse_temperature, T* e, int64_t n, const In* ahead) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum_a = {}, sum_b = {}, product_a = {}, product_b = {};
  const auto step = [&](Vec<T> logits, int64_t i, Vec<T>& sum, Vec<T>& product)
                        __attribute__((always_inline)) {
                          const Vec<T> x = (logits - top) * inverse_temperature;
                          const Vec<T> y = exp_of<T>(x);
                          store(e + i, y);
                          sum += y;
                          if constexpr (kProduct) product = add_product<T>(y, x, product);
                        };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    __builtin_prefetch(ahead + i);
    __builtin_prefetch(ahead + i + L);
    step(load(z + i), i, sum_a, product_a);
    step(load(z + i + L), i + L, sum_b, product_b);
  }
  for (; i < n; i += L) {
    step(n - i < L ? load_first(z + i, n - i, kLowest<T>) : load(z + i), i, sum_a, product_a);
  }
  return {reduced<T>(sum_a + sum_b, added<Vec<T>>),
          kProduct ? reduced<T>(product_a + product_b, added<Vec<T>>) : T(0)};
}

// p log(p), 0 for p = 0.
template <typename T>
[[gnu::always_inline]] inline Vec<T> times_log(Vec<T> p) {
  return p * log_of<T>(larger(p, all(std::numeric_limits<T>::min())));
}

// The largest of many numbers, lane by lane, with its index; the first if there are equals.
template <typename T>
struct LaneMaximum {
  using Bits = typename Real<T>::Bits;
  Vec<T> value;
  Bits index;

  // Written out, as all constructors of vectors here: an implicit one has no instruction set.
  LaneMaximum() : value(all(kLowest<T>)), index{} {}

  [[gnu::always_inline]] void take(Vec<T> v, Bits at) {
    const auto higher = v > value;
    value = higher ? v : value;
    index = higher ? at : index;
  }
};

// What is known of a mean: its entropy, and the largest probability and where it is.
template <typename T>
struct MeanSummary {
  double entropy = 0;
  T highest = kLowest<T>;
  int64_t argmax = 0;

  void take(T value, int64_t at) {
    if (value > highest || (value == highest && at < argmax)) highest = value, argmax = at;
  }
};

// out = before + the sum over rows of scale * e, rows being `pitch` apart in e; `before` may be
// out, or null for zeros. With a summary, out is a mean's stretch from class `first` on.
template <bool kSummary, typename T>
void combine_into(const T* before, const T* e, int64_t pitch, const T* scales, int64_t rows, T* out,
                  int64_t n, int64_t first, MeanSummary<T>* summary) {
  constexpr int64_t L = kLanes<T>;
  LaneMaximum<T> maximum;
  typename Real<T>::Bits at = {};
  for (int64_t l = 0; l < L; ++l) at[l] = static_cast<typename Real<T>::Word>(l);
  Vec<T> sum_of_logs = {};
  const auto sum_from = [&](Vec<T> sum, int64_t i) __attribute__((always_inline)) {
    for (int64_t k = 0; k < rows; ++k) {
      sum = mul_add(load(e + k * pitch + i), all(scales[k]), sum);
    }
    if constexpr (kSummary) {
      maximum.take(sum, at);
      at += L;
      sum_of_logs += times_log<T>(sum);
    }
    return sum;
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    store(out + i, sum_from(before == nullptr ? Vec<T>{} : load(before + i), i));
  }
  if (i < n) {
    const Vec<T> last = before == nullptr ? Vec<T>{} : load_first(before + i, n - i, T(0));
    store_first(out + i, sum_from(last, i), n - i);
  }
  if constexpr (kSummary) {
    summary->entropy -= reduced<T>(sum_of_logs, added<Vec<T>>);
    for (int64_t l = 0; l < L; ++l) summary->take(maximum.value[l], first + maximum.index[l]);
  }
}

// The same, its summary in stretches so short that their sums of logarithms are accurate.
template <typename T>
void combine(const T* before, const T* e, int64_t pitch, const T* scales, int64_t rows, T* out,
             int64_t n, int64_t first, MeanSummary<T>* summary) {
  constexpr int64_t kStretch = 64 * kLanes<T>;
  if (summary == nullptr) {
    return combine_into<false>(before, e, pitch, scales, rows, out, n, first, summary);
  }
  for (int64_t at = 0; at < n; at += kStretch) {
    combine_into<true>(before == nullptr ? nullptr : before + at, e + at, pitch, scales, rows,
                       out + at, std::min(kStretch, n - at), first + at, summary);
  }
}

// log(sum of e^x) of many x, lane by lane, however small they all are.
template <typename T>
struct LogSum {
  Vec<T> highest;
  Vec<T> sum;  // of e^(x - highest)

  LogSum() : highest(all(kLowest<T>)), sum{} {}
  LogSum(Vec<T> highest, Vec<T> sum) : highest(highest), sum(sum) {}

  [[gnu::always_inline]] void add(Vec<T> x) {
    const auto higher = x > highest;
    const Vec<T> gap = higher ? highest - x : x - highest;
    const Vec<T> e = exp_of<T>(x == highest ? Vec<T>{} : gap);  // both may be -inf
    sum = higher ? mul_add(sum, e, all(T(1))) : sum + e;
    highest = higher ? x : highest;
  }
  [[gnu::always_inline]] Vec<T> value() const { return highest + log_of<T>(sum); }
};

// log(sum of e^x) of numbers that are overwritten; x has room for whole vectors.
template <typename T>
T log_sum_exp(T* x, int64_t n) {
  const T top = largest(x, n);
  const T origin = top == kLowest<T> ? T(0) : top;  // all may be -inf
  return origin + std::log(exponentials<false>(x, origin, T(1), x, n, x).exp);
}

// Entropy of e^x / sum, and the logarithm of a weighted probability: of a number or of lanes.
template <typename V>
[[gnu::always_inline]] inline V entropy_of(V log_sum, V sum, V product) {
  return log_sum - product / sum;
}
template <typename V, typename T>
[[gnu::always_inline]] inline V log_probability(V z, V top, T inverse_temperature, V log_sum,
                                                T log_weight) {
  return (z - top) * inverse_temperature - log_sum + log_weight;
}

template <typename T>
constexpr int64_t padded(int64_t classes) {
  return (classes + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
