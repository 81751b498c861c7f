// Softmax of rows too long for one block's registers, in launches one after another: sums over
// each part of each member's row, then the mean, then, where they are wanted, its statistics.
#pragma once

#include "cuda/ensemble_softmax.cuh"

namespace fastfreeze {

constexpr int kSplitThreads = 256;
template <typename In>
constexpr int kMinSplitBlocks = std::is_same_v<In, double> ? 1 : 2;
template <typename In>
constexpr int kSplitClasses = kSplitThreads * kBlockItems<In>;

// A part's sums, its top moved up to `top`.
template <typename T>
__device__ __forceinline__ MemberSum<T> moved(const MemberSum<T>& s, T top, T inverse_temperature) {
  if (s.top == top || s.top == -INFINITY) return {top, s.sum, s.weighted};
  const T x = (s.top - top) * inverse_temperature;
  const T e = exp_of(x);
  return {top, e * s.sum, e > 0 ? e * (s.weighted + x * s.sum) : e * s.sum};
}

template <typename T>
__device__ __forceinline__ MemberSum<T> merged(const MemberSum<T>& a, const MemberSum<T>& b,
                                               T inverse_temperature) {
  const T top = larger(a.top, b.top);
  const MemberSum<T> c = moved(a, top, inverse_temperature), d = moved(b, top, inverse_temperature);
  return {top, c.sum + d.sum, c.weighted + d.weighted};
}

// A warp's work: the sums of a whole row.
template <typename T>
__device__ __forceinline__ MemberSum<T> sum_of_splits(const SoftmaxJob<T>& job, int64_t row,
                                                      int m) {
  const MemberSum<T>* sums = job.member_sums + (row * job.num_members + m) * job.splits;
  MemberSum<T> s{-T(INFINITY), T(0), T(0)};
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < job.splits; i += 32) {
    s = merged(s, sums[i], job.inverse_temperature);
  }
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    const MemberSum<T> other{__shfl_xor_sync(kAllLanes, s.top, distance),
                             __shfl_xor_sync(kAllLanes, s.sum, distance),
                             __shfl_xor_sync(kAllLanes, s.weighted, distance)};
    s = merged(s, other, job.inverse_temperature);
  }
  return s;
}

// A warp's stretch of a part of a row.
template <int kVec, typename In>
__device__ __forceinline__ Stretch stretch_of(const In* row, int64_t split, int warp,
                                              int64_t classes) {
  constexpr int kSize = kBlockItems<In> * 32;
  return stretch_at<kVec>(row, split * kSplitClasses<In> + warp * kSize, classes, kSize);
}

template <typename In, int kVec>
__global__ void __launch_bounds__(kSplitThreads, kMinSplitBlocks<In>)
    softmax_split_sum_kernel(const __grid_constant__ SoftmaxJob<SoftmaxMath<In>> job) {
  using T = SoftmaxMath<In>;
  constexpr int kItems = kBlockItems<In>;
  __shared__ typename BlockGroup<T>::Room room;
  BlockGroup<T> group{room};
  const int64_t blocks = job.rows * job.num_members * job.splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row_and_member = block / job.splits;
    const int64_t row = row_and_member / job.num_members;
    const int m = static_cast<int>(row_and_member % job.num_members);
    const In* data = member_row<In>(job, m, row);
    const Stretch stretch = stretch_of<kVec>(data, block % job.splits, group.warp(), job.classes);
    Vec<In, kVec> items[kItems / kVec];
    T z[kItems];
    load_items(items, data, stretch, group);
    widen(items, z);
    const T top = group.max(highest(z));
    // Where all of a part is masked, its sums are 0: other parts decide.
    MemberSum<T> s = exponentiate<SoftmaxMode::statistics>(z, top == -INFINITY ? T(0) : top,
                                                           job.inverse_temperature);
    s = {top, group.sum(s.sum), group.sum(s.weighted)};
    if (threadIdx.x == 0) job.member_sums[block] = s;
  }
}

template <typename In, bool kLog, int kVec>
__global__ void __launch_bounds__(kSplitThreads, kMinSplitBlocks<In>)
    softmax_split_mean_kernel(const __grid_constant__ SoftmaxJob<SoftmaxMath<In>> job) {
  using T = SoftmaxMath<In>;
  constexpr SoftmaxMode kMode = kLog ? SoftmaxMode::log : SoftmaxMode::sum;
  constexpr int kItems = kBlockItems<In>;
  __shared__ typename BlockGroup<T>::Room room;
  __shared__ T tops[kMaxMembers], factors[kMaxMembers];
  BlockGroup<T> group{room};
  const int64_t blocks = job.rows * job.splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block / job.splits;
    const Stretch stretch = stretch_of<kVec>(member_row<In>(job, 0, row), block % job.splits,
                                             group.warp(), job.classes);
    Vec<In, kVec> next[kItems / kVec];
    T z[kItems], total[kItems];
    load_items(next, member_row<In>(job, 0, row), stretch, group);
    start_total<kMode, kVec>(total, before_row(job, row), stretch, group);
    __syncthreads();  // the block before has read its factors
    for (int m = group.warp(); m < job.num_members; m += kSplitThreads / 32) {
      const MemberSum<T> s = sum_of_splits(job, row, m);
      const T factor = job.weight[m] / s.sum;
      if (group.lane() == 0) {
        tops[m] = s.top;
        factors[m] = kLog ? log_of(factor) : factor;
      }
    }
    __syncthreads();
    for (int m = 0; m < job.num_members; ++m) {
      widen(next, z);
      if (m + 1 < job.num_members) {
        load_items(next, member_row<In>(job, m + 1, row), stretch, group);
      }
      exponentiate<kMode>(z, tops[m], job.inverse_temperature);
      add_member<kMode>(total, z, factors[m]);
    }
    store_total<In, kVec>(job, total, row, stretch, group);
    if (kLog || job.max_probability == nullptr) continue;
    const int64_t begin = block % job.splits * kSplitClasses<In>;
    MeanSummary<T> mean = summarise<kVec>(total, static_cast<int>(stretch.first() - begin), group);
    mean.index += begin;
    if (threadIdx.x == 0) job.mean_summaries[block] = mean;
  }
}

// A warp's work: the summary of a whole row.
template <typename T>
__device__ __forceinline__ MeanSummary<T> summary_of_splits(const SoftmaxJob<T>& job, int64_t row) {
  const MeanSummary<T>* parts = job.mean_summaries + row * job.splits;
  LaneGroup<32> warp;
  T best = T(-1), entropy = T(0);
  int64_t part = 0;
#pragma unroll 1
  for (int64_t i = warp.lane(); i < job.splits; i += 32) {
    if (parts[i].best > best) {
      best = parts[i].best;
      part = i;
    }
    entropy += parts[i].entropy;
  }
  const T highest_of_all = warp.max(best);
  const T first = warp.max(best == highest_of_all ? -static_cast<T>(part) : -T(INFINITY));
  const int64_t index = parts[static_cast<int64_t>(-first)].index;
  return {highest_of_all, warp.sum(entropy), index};
}

// A warp to a row.
template <typename In>
__global__ void __launch_bounds__(kRowThreads)
    softmax_split_statistics_kernel(const __grid_constant__ SoftmaxJob<SoftmaxMath<In>> job) {
  using T = SoftmaxMath<In>;
  constexpr int kRows = kRowThreads / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  const bool writer = threadIdx.x % 32 == 0;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  for (; row < job.rows; row += step) {
    MemberTerms<T> terms;
    for (int m = 0; m < job.num_members; ++m) {
      terms.add(job.weight[m], sum_of_splits(job, row, m), label_logit<In>(job, m, row),
                job.inverse_temperature);
    }
    if (job.max_probability != nullptr) {
      const MeanSummary<T> mean = summary_of_splits(job, row);
      if (writer) write_mean(job, row, mean, terms);
    }
    if (job.entropy_sum != nullptr && writer) job.entropy_sum[row] += terms.entropy;
  }
}

}  // namespace fastfreeze
