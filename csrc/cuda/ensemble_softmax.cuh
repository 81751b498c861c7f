// Softmax over the last dimension, summed over members, a row in the registers of those who share
// it: some lanes, or a block. Each logit is read once. Rows too long for that:
// ensemble_softmax_split.cuh. A bad row (NaN, +inf, or -inf alone) comes out NaN throughout, its
// sum of exponentials being NaN.
#pragma once

#include "cuda/device.cuh"

namespace fastfreeze {

constexpr int kMaxMembers = 128;  // their addresses come with the launch's 4 KB of arguments
constexpr int kRowThreads = 128;
constexpr int kMaxBlockThreads = 512;

// statistics: a sum too, with the job's pointers that are not null.
enum class SoftmaxMode { sum, log, statistics };

template <typename In>
using SoftmaxMath = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Elements of a row that a thread holds: as many as need no local memory with the registers that
// the kernels' launch bounds leave, and so many bytes in flight.
template <typename In>
constexpr int kLaneItems = std::is_same_v<In, double> ? 16 : 32;
template <typename In>
constexpr int kBlockItems = std::is_same_v<In, double> ? 12 : 24;
template <typename In>
constexpr int kMinBlocks = std::is_same_v<In, double> ? 3 : 4;

// Of one member, in one row or a part of one, with x = (z - top) / temperature.
template <typename T>
struct MemberSum {
  T top;
  T sum;       // of e^x
  T weighted;  // of x e^x
};

// Of the mean, in one row or a part of one.
template <typename T>
struct MeanSummary {
  T best;  // below 0: there is none, the row is bad
  T entropy;
  int64_t index;  // of the first that is best
};

// out = before + sum over members of weight * softmax(z / temperature), or the sum's logarithm.
template <typename T>
struct SoftmaxJob {
  const void* data[kMaxMembers];
  int64_t stride[kMaxMembers];  // elements from one row to the next
  T weight[kMaxMembers];
  int32_t num_members;
  bool out_is_sum;  // `out` holds T, else the members' dtype
  T inverse_temperature;
  int64_t rows;
  int64_t classes;
  void* out;        // [rows, classes]
  const T* before;  // the same, or null for zeros
  // [rows] each, or null. All four of the mean's come together.
  const int64_t* labels;
  T* max_probability;
  int64_t* argmax;
  T* entropy;
  T* mutual_information;
  T* nll;          // wants labels
  T* entropy_sum;  // += sum over members of weight * entropy
  // Workspace of rows that are split.
  int64_t splits;
  MemberSum<T>* member_sums;       // [rows, num_members, splits]
  MeanSummary<T>* mean_summaries;  // [rows, splits]
};

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// log(e^a + e^b), NaN if one of them is.
template <typename T>
__device__ __forceinline__ T log_add(T a, T b) {
  const T high = a > b ? a : b;
  const T low = a > b ? b : a;
  return high == -INFINITY ? high + low : high + log_of(T(1) + exp_of(low - high));
}

// kLanes neighbours of a warp share a row, their vectors taking turns.
template <int kLaneCount>
struct LaneGroup {
  static constexpr int kLanes = kLaneCount;

  __device__ __forceinline__ int lane() const { return threadIdx.x % kLanes; }
  __device__ __forceinline__ int warp() const { return 0; }
  template <typename T>
  __device__ __forceinline__ T sum(T value) {
    return reduce_lanes<kLanes>(value, [](T a, T b) { return a + b; });
  }
  template <typename T>
  __device__ __forceinline__ T max(T value) {
    return reduce_lanes<kLanes>(value, [](T a, T b) { return larger(a, b); });
  }
};

// The warps of a block share a row, a stretch to each.
template <typename T>
struct BlockGroup {
  static constexpr int kLanes = 32;
  static constexpr int kWarps = kMaxBlockThreads / 32;
  using Room = T[2][kWarps];  // used in turn: one barrier a reduction is enough

  Room& room;
  int turn = 0;

  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ T sum(T value) {
    return reduce(value, T(0), [](T a, T b) { return a + b; });
  }
  __device__ __forceinline__ T max(T value) {
    return reduce(value, -T(INFINITY), [](T a, T b) { return larger(a, b); });
  }

 private:
  template <typename Combine>
  __device__ __forceinline__ T reduce(T value, T neutral, const Combine& combine) {
    value = reduce_lanes<32>(value, combine);
    turn ^= 1;
    if (lane() == 0) room[turn][warp()] = value;
    __syncthreads();
    const unsigned other = threadIdx.x % kWarps;
    return reduce_lanes<kWarps>(other < blockDim.x / 32 ? room[turn][other] : neutral, combine);
  }
};

// Where in its stretch of the row a thread's i-th vector is.
template <int kVec, typename Group>
__device__ __forceinline__ int place_of(int i, const Group& group) {
  return (i * Group::kLanes + group.lane()) * kVec;
}

// Part of a row, by places: those of whole vectors, aligned where the row of the first member is.
// Where that begins between two vectors all moves on by `shift`: places before the row's first
// class are masked, as are those from `count` on.
struct Stretch {
  int64_t begin;  // the class at place `shift`
  int shift, count;

  __device__ __forceinline__ int64_t first() const { return begin - shift; }
  __device__ __forceinline__ bool holds(int place) const {
    return (begin > 0 || place >= shift) && place < count;
  }
  template <int kVec>
  __device__ __forceinline__ bool whole(int place) const {
    return (begin > 0 || place >= shift) && place + kVec <= count;
  }
};

template <int kVec, typename In>
__device__ __forceinline__ Stretch stretch_at(const In* row, int64_t begin, int64_t classes,
                                              int size) {
  const auto element = reinterpret_cast<uintptr_t>(row) / sizeof(In);
  const int shift = static_cast<int>(element % kVec);
  const int64_t left = classes - begin + shift;
  return {begin, shift, static_cast<int>(left < size ? left : size)};
}

// row: the row's class 0.
template <int kVec, int kCount, typename In, typename Group>
__device__ __forceinline__ void load_items(Vec<In, kVec> (&items)[kCount], const In* row,
                                           const Stretch& stretch, const Group& group) {
  const In* p = row + stretch.first();
  const bool vectors = kVec == 1 || aligned16(p);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) items[i][v] = from_math<In>(-INFINITY);
    const int c = place_of<kVec>(i, group);
    if (vectors && stretch.whole<kVec>(c)) {
      items[i] = load_vec<In, kVec>(p + c);
    } else if (kVec > 1) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (stretch.holds(c + v)) items[i][v] = *as_global(p + c + v);
      }
    }
  }
}

template <int kVec, int kCount, typename In, typename T>
__device__ __forceinline__ void widen(const Vec<In, kVec> (&items)[kCount], T (&z)[kCount * kVec]) {
#pragma unroll
  for (int i = 0; i < kCount * kVec; ++i) z[i] = to_math<T>(items[i / kVec][i % kVec]);
}

// What the sum starts from. before: the row's, or null.
template <SoftmaxMode kMode, int kVec, int kItems, typename T, typename Group>
__device__ __forceinline__ void start_total(T (&total)[kItems], const T* before,
                                            const Stretch& stretch, const Group& group) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) total[i] = kMode == SoftmaxMode::log ? -T(INFINITY) : T(0);
  if (before == nullptr) return;
  const T* p = before + stretch.first();
  const bool vectors = kVec == 1 || aligned16(p);
#pragma unroll
  for (int i = 0; i < kItems / kVec; ++i) {
    const int c = place_of<kVec>(i, group);
    if (vectors && stretch.whole<kVec>(c)) {
      const Vec<T, kVec> vec = load_vec<T, kVec>(p + c);
#pragma unroll
      for (int v = 0; v < kVec; ++v) total[i * kVec + v] = vec[v];
    } else if (kVec > 1) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (stretch.holds(c + v)) total[i * kVec + v] = *as_global(p + c + v);
      }
    }
  }
}

template <typename Out, int kVec, int kItems, typename T, typename Group>
__device__ __forceinline__ void store_items(const T (&total)[kItems], Out* row,
                                            const Stretch& stretch, const Group& group) {
  Out* p = row + stretch.first();
  const bool vectors = kVec == 1 || aligned16(p);
#pragma unroll
  for (int i = 0; i < kItems / kVec; ++i) {
    Vec<Out, kVec> vec;
#pragma unroll
    for (int v = 0; v < kVec; ++v) vec[v] = from_math<Out>(total[i * kVec + v]);
    const int c = place_of<kVec>(i, group);
    if (vectors && stretch.whole<kVec>(c)) {
      store_vec(p + c, vec);
    } else if (kVec > 1) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (stretch.holds(c + v)) *as_global(p + c + v) = vec[v];
      }
    }
  }
}

// The output's part of a row.
template <typename In, int kVec, int kItems, typename T, typename Group>
__device__ __forceinline__ void store_total(const SoftmaxJob<T>& job, const T (&total)[kItems],
                                            int64_t row, const Stretch& stretch,
                                            const Group& group) {
  if (std::is_same_v<In, T> || job.out_is_sum) {
    store_items<T, kVec>(total, static_cast<T*>(job.out) + row * job.classes, stretch, group);
  } else {
    store_items<In, kVec>(total, static_cast<In*>(job.out) + row * job.classes, stretch, group);
  }
}

template <int kItems, typename T>
__device__ __forceinline__ T highest(const T (&z)[kItems]) {
  T top = z[0];
#pragma unroll
  for (int i = 1; i < kItems; ++i) top = larger(top, z[i]);
  return top;
}

// z becomes e^x, or x where the logarithm is wanted.
template <SoftmaxMode kMode, int kItems, typename T>
__device__ __forceinline__ MemberSum<T> exponentiate(T (&z)[kItems], T top, T inverse_temperature) {
  MemberSum<T> s{top, T(0), T(0)};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const T x = (z[i] - top) * inverse_temperature;
    const T e = exp_of(x);
    s.sum += e;
    if (kMode == SoftmaxMode::statistics) s.weighted += e > 0 ? e * x : e;
    z[i] = kMode == SoftmaxMode::log ? x : e;
  }
  return s;
}

// factor: weight / sum, or its logarithm.
template <SoftmaxMode kMode, int kItems, typename T>
__device__ __forceinline__ void add_member(T (&total)[kItems], const T (&z)[kItems], T factor) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (kMode == SoftmaxMode::log) {
      total[i] = log_add(total[i], z[i] + factor);
    } else {
      total[i] += z[i] * factor;
    }
  }
}

template <typename In, typename T>
__device__ __forceinline__ const In* member_row(const SoftmaxJob<T>& job, int m, int64_t row) {
  return static_cast<const In*>(job.data[m]) + row * job.stride[m];
}

template <typename T>
__device__ __forceinline__ const T* before_row(const SoftmaxJob<T>& job, int64_t row) {
  return job.before == nullptr ? nullptr : job.before + row * job.classes;
}

// Sums over members of what statistics need beside the mean.
template <typename T>
struct MemberTerms {
  T entropy = T(0);
  T log_likelihood = -T(INFINITY);  // of the label, under the mean

  __device__ __forceinline__ void add(T weight, const MemberSum<T>& s, T label_logit,
                                      T inverse_temperature) {
    entropy += weight * (log_of(s.sum) - s.weighted / s.sum);
    const T x = (label_logit - s.top) * inverse_temperature;
    log_likelihood = log_add(log_likelihood, x + log_of(weight / s.sum));
  }
};

// NaN if there are no labels, or if it is no class.
template <typename In, typename T>
__device__ __forceinline__ T label_logit(const SoftmaxJob<T>& job, int m, int64_t row) {
  if (job.labels == nullptr) return T(NAN);
  const int64_t label = *as_global(job.labels + row);
  if (label < 0 || label >= job.classes) return T(NAN);
  return to_math<T>(*as_global(member_row<In>(job, m, row) + label));
}

// base: the class at place 0. Every thread of the group gets the result.
template <int kVec, int kItems, typename T, typename Group>
__device__ __forceinline__ MeanSummary<T> summarise(const T (&mean)[kItems], int base,
                                                    Group& group) {
  T best = T(-1), entropy = T(0);
  int index = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const T p = mean[i];
    if (p > best) {
      best = p;
      index = place_of<kVec>(i / kVec, group) + i % kVec;
    }
    entropy -= p == 0 ? p : p * log_of(p);
  }
  const T highest_of_all = group.max(best);
  const T first = group.max(best == highest_of_all ? -static_cast<T>(base + index) : -T(INFINITY));
  return {highest_of_all, group.sum(entropy), static_cast<int64_t>(-first)};
}

// One thread's work.
template <typename T>
__device__ __forceinline__ void write_mean(const SoftmaxJob<T>& job, int64_t row,
                                           const MeanSummary<T>& mean,
                                           const MemberTerms<T>& terms) {
  const bool bad = !(mean.best >= 0);
  const T entropy = bad ? T(NAN) : larger(mean.entropy, T(0));  // rounding may leave p above 1
  const T information = entropy - terms.entropy;
  *as_global(job.max_probability + row) = bad ? T(NAN) : mean.best;
  *as_global(job.argmax + row) = bad ? 0 : mean.index;
  *as_global(job.entropy + row) = entropy;
  *as_global(job.mutual_information + row) = information < 0 ? T(0) : information;
  if (job.nll != nullptr) *as_global(job.nll + row) = -terms.log_likelihood;
}

// The next member's logits are on their way while a member's are reduced. store: this row is one
// to write, not one that idle lanes repeat.
template <typename In, SoftmaxMode kMode, int kVec, int kItems, typename T, typename Group>
__device__ __forceinline__ void softmax_row(const SoftmaxJob<T>& job, int64_t row, bool store,
                                            Group& group) {
  constexpr bool kStatistics = kMode == SoftmaxMode::statistics;
  constexpr int kSize = kItems * 32;  // of a warp's part; lanes that share a warp have it all
  const Stretch stretch =
      stretch_at<kVec>(member_row<In>(job, 0, row), group.warp() * kSize, job.classes, kSize);
  Vec<In, kVec> next[kItems / kVec];
  T z[kItems], total[kItems];
  MemberTerms<T> terms;
  load_items(next, member_row<In>(job, 0, row), stretch, group);
  start_total<kMode, kVec>(total, before_row(job, row), stretch, group);
  for (int m = 0; m < job.num_members; ++m) {
    widen(next, z);
    if (m + 1 < job.num_members) {
      load_items(next, member_row<In>(job, m + 1, row), stretch, group);
    }
    const T label = kStatistics ? label_logit<In>(job, m, row) : T(0);
    const T top = group.max(highest(z));
    MemberSum<T> s = exponentiate<kMode>(z, top, job.inverse_temperature);
    s.sum = group.sum(s.sum);
    const T factor = job.weight[m] / s.sum;
    add_member<kMode>(total, z, kMode == SoftmaxMode::log ? log_of(factor) : factor);
    if (!kStatistics) continue;
    s.weighted = group.sum(s.weighted);
    terms.add(job.weight[m], s, label, job.inverse_temperature);
  }
  if (store) store_total<In, kVec>(job, total, row, stretch, group);
  if (!kStatistics) return;
  const bool writer = store && group.lane() == 0 && group.warp() == 0;
  if (job.max_probability != nullptr) {
    const MeanSummary<T> mean = summarise<kVec>(total, static_cast<int>(stretch.first()), group);
    if (writer) write_mean(job, row, mean, terms);
  }
  if (job.entropy_sum != nullptr && writer) *as_global(job.entropy_sum + row) += terms.entropy;
}

template <typename In, SoftmaxMode kMode, int kVec, int kLanes, int kItems>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<In>)
    softmax_lanes_kernel(const __grid_constant__ SoftmaxJob<SoftmaxMath<In>> job) {
  constexpr int kRows = kRowThreads / kLanes;
  LaneGroup<kLanes> group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < job.rows; first += step) {
    // Past the last row lanes repeat it: all lanes of a warp take part in its reductions.
    const int64_t row = first + threadIdx.x / kLanes;
    const bool mine = row < job.rows;
    softmax_row<In, kMode, kVec, kItems>(job, mine ? row : job.rows - 1, mine, group);
  }
}

template <typename In, SoftmaxMode kMode, int kVec>
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    softmax_block_kernel(const __grid_constant__ SoftmaxJob<SoftmaxMath<In>> job) {
  using Group = BlockGroup<SoftmaxMath<In>>;
  __shared__ typename Group::Room room;
  Group group{room};
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    softmax_row<In, kMode, kVec, kBlockItems<In>>(job, row, true, group);
  }
}

}  // namespace fastfreeze
