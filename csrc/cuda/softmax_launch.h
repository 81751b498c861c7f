// Which softmax kernel a job takes, and how many blocks of it. `Launch` is called with a kernel,
// the blocks wanted, threads to a block, and the job; it may start fewer blocks: kernels loop.
#pragma once

#include "cuda/ensemble_softmax_split.cuh"

namespace fastfreeze {

static_assert(sizeof(SoftmaxJob<double>) <= 4096, "what a launch's arguments may be");

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements that are loaded at once, of long rows.
template <typename In>
constexpr int kVecOf = sizeof(In) < 8 ? 16 / sizeof(In) : 1;

// Places that a row takes at most: a vector more where one may begin between two of them.
template <typename In, typename T>
int64_t softmax_places(const SoftmaxJob<T>& job) {
  bool even = true;
  for (int m = 0; m < job.num_members; ++m) {
    even = even && aligned16(static_cast<const char*>(job.data[m])) &&
           (job.rows == 1 || job.stride[m] % kVecOf<In> == 0);
  }
  return job.classes + (even ? 0 : kVecOf<In> - 1);
}

// Into how many parts a row is split; 0: not at all.
template <typename In, typename T>
int64_t softmax_splits(const SoftmaxJob<T>& job) {
  const int64_t places = softmax_places<In>(job);
  if (places <= static_cast<int64_t>(kMaxBlockThreads) * kBlockItems<In>) return 0;
  return ceil_div(places, kSplitClasses<In>);
}

// Bytes of workspace that a job with `splits` wants.
template <typename T>
int64_t workspace_bytes(const SoftmaxJob<T>& job) {
  const int64_t members = job.num_members * static_cast<int64_t>(sizeof(MemberSum<T>));
  const auto mean = static_cast<int64_t>(sizeof(MeanSummary<T>));
  return job.rows * job.splits * (mean + members);
}

template <typename T>
void set_workspace(SoftmaxJob<T>& job, void* memory) {
  job.mean_summaries = static_cast<MeanSummary<T>*>(memory);
  job.member_sums = reinterpret_cast<MemberSum<T>*>(job.mean_summaries + job.rows * job.splits);
}

template <typename In, SoftmaxMode kMode, int kVec, int kLanes, int kItems, typename T,
          typename Launch>
void launch_lanes(const SoftmaxJob<T>& job, const Launch& launch) {
  static_assert(kItems <= kLaneItems<In>);
  launch(softmax_lanes_kernel<In, kMode, kVec, kLanes, kItems>,
         ceil_div(job.rows, kRowThreads / kLanes), kRowThreads, job);
}

template <typename In, SoftmaxMode kMode, int kVec, typename T, typename Launch>
void launch_wide(const SoftmaxJob<T>& job, const Launch& launch) {
  constexpr int kItems = kLaneItems<In>;
  constexpr bool kLog = kMode == SoftmaxMode::log;
  const int64_t places = softmax_places<In>(job);
  if constexpr (!kLog) {
    if (places <= 32 * 16) return launch_lanes<In, kMode, kVec, 32, 16>(job, launch);
  }
  if (places <= 32 * kItems) return launch_lanes<In, kMode, kVec, 32, kItems>(job, launch);
  if (job.splits == 0) {
    const int64_t warps = ceil_div(places, kBlockItems<In> * 32);
    return launch(softmax_block_kernel<In, kMode, kVec>, job.rows, static_cast<int>(warps) * 32,
                  job);
  }
  const int64_t parts = job.rows * job.splits;
  launch(softmax_split_sum_kernel<In, kVec>, parts * job.num_members, kSplitThreads, job);
  launch(softmax_split_mean_kernel<In, kLog, kVec>, parts, kSplitThreads, job);
  if (kMode == SoftmaxMode::statistics) {
    launch(softmax_split_statistics_kernel<In>, ceil_div(job.rows, kRowThreads / 32), kRowThreads,
           job);
  }
}

// rows > 0. Vectors are for what waits for memory, and moves less than 8 bytes a lane without them:
// few classes coalesce anyway, and logarithms wait for arithmetic.
template <typename In, SoftmaxMode kMode, typename T, typename Launch>
void launch_softmax(const SoftmaxJob<T>& job, const Launch& launch) {
  if (job.classes <= 4 * 4) return launch_lanes<In, kMode, 1, 4, 4>(job, launch);
  if (job.classes <= 8 * 16) return launch_lanes<In, kMode, 1, 8, 16>(job, launch);
  launch_wide<In, kMode, kMode == SoftmaxMode::log ? 1 : kVecOf<In>>(job, launch);
}

template <typename In, typename T, typename Launch>
void launch_softmax(SoftmaxMode mode, const SoftmaxJob<T>& job, const Launch& launch) {
  switch (mode) {
    case SoftmaxMode::sum:
      return launch_softmax<In, SoftmaxMode::sum>(job, launch);
    case SoftmaxMode::log:
      return launch_softmax<In, SoftmaxMode::log>(job, launch);
    case SoftmaxMode::statistics:
      return launch_softmax<In, SoftmaxMode::statistics>(job, launch);
  }
}

}  // namespace fastfreeze
