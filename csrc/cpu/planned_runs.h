// What the plans of CPU optimizers share: the tensors' elements cut into runs, how threads share
// them, and the groups' schedule.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "schedule_math.h"

namespace fastfreeze {

constexpr int64_t kRunElements = 8192;  // 32 KB of fp32: three such runs fit in an L2 cache
constexpr int64_t kElementsPerThread =
    32768;  // below this a second thread costs more than it saves

struct Run {
  int64_t tensor;
  int64_t offset;
  int64_t size;
};

// Has the first cache lines come. Small tensors lie apart: the next one's lines would otherwise be
// asked for only when this one's are done with.
inline void prefetch(const void* memory) {
  for (int line = 0; line < 4; ++line) {
    __builtin_prefetch(static_cast<const char*>(memory) + 64 * line);
  }
}

class PlannedRuns {
 public:
  // segments: float64 [s, 3]; segment_begin: int64 [num_groups + 1, 1].
  PlannedRuns(const Tensor& segments, const Tensor& segment_begin, double eta_min,
              int64_t warmup_steps)
      : eta_min_(eta_min), warmup_steps_(static_cast<double>(warmup_steps)) {
    check_table(segments, "segments", ScalarType::Double, 3, true);
    check_table(segment_begin, "segment_begin", ScalarType::Long, 1, true);
    STD_TORCH_CHECK(segment_begin.size(0) >= 1, "segment_begin must not be empty");
    const auto* begin = static_cast<const int64_t*>(segment_begin.data_ptr());
    begin_.assign(begin, begin + segment_begin.size(0));
    STD_TORCH_CHECK(begin_.back() == segments.size(0),
                    "segment_begin must end with the number of segments");
    STD_TORCH_CHECK(begin_.front() == 0 && std::is_sorted(begin_.begin(), begin_.end()),
                    "segment_begin must rise from 0");
    const auto* segment = static_cast<const double*>(segments.data_ptr());
    for (int64_t i = 0; i < segments.size(0); ++i, segment += 3) {
      segments_.push_back({segment[0], segment[1], segment[2]});
    }
  }

  int64_t num_groups() const { return static_cast<int64_t>(begin_.size()) - 1; }
  SegmentTable table() const { return {segments_.data(), begin_.data(), eta_min_, warmup_steps_}; }

  // The next tensor's elements.
  void add(int64_t group, int64_t numel) {
    STD_TORCH_CHECK(group >= 0 && group < num_groups(), "a tensor names group ", group);
    STD_TORCH_CHECK(numel >= 0, "a tensor has ", numel, " elements");
    numel_.push_back(numel);
  }

  // Calls update(run) for each run of the tensors that is_live(tensor) names, in as many threads as
  // that is worth. Those of a network that is frozen in part cost nothing, and go to no thread.
  // Before, it calls expect(tensor) for what comes next.
  template <typename IsLive, typename Expect, typename Update>
  void for_each(const IsLive& is_live, const Expect& expect, const Update& update) const {
    std::vector<int64_t> live, begin{0};  // who, and how many elements lie before each
    live.reserve(numel_.size());
    begin.reserve(numel_.size() + 1);
    for (int64_t t = 0; t < static_cast<int64_t>(numel_.size()); ++t) {
      if (numel_[t] == 0 || !is_live(t)) continue;
      live.push_back(t);
      begin.push_back(begin.back() + numel_[t]);
    }
    const int64_t wanted = (begin.back() + kElementsPerThread - 1) / kElementsPerThread;
    const int64_t threads =
        std::max<int64_t>(1, std::min<int64_t>(wanted, torch::stable::get_num_threads()));
    // Of equal numbers of elements; a run is in the share in which it begins.
    const auto share = [&](int64_t first, int64_t last) {
      const int64_t from = begin.back() * first / threads, to = begin.back() * last / threads;
      size_t i = std::upper_bound(begin.begin(), begin.end(), from) - begin.begin() - 1;
      for (; i < live.size() && begin[i] < to; ++i) {
        if (i + 1 < live.size()) expect(live[i + 1]);
        const int64_t numel = begin[i + 1] - begin[i],
                      skipped = std::max<int64_t>(0, from - begin[i]);
        int64_t offset = (skipped + kRunElements - 1) / kRunElements * kRunElements;
        for (; offset < numel && begin[i] + offset < to; offset += kRunElements) {
          update(Run{live[i], offset, std::min(kRunElements, numel - offset)});
        }
      }
    };
    if (threads == 1) {
      share(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, share);
    }
  }

 private:
  std::vector<int64_t> numel_;  // of each tensor
  std::vector<Segment> segments_;
  std::vector<int64_t> begin_;  // of each group's segments, and the end
  double eta_min_;
  double warmup_steps_;
};

inline int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Whether what a step keeps of a parameter is wider than the parameter; raises if it may not be so.
inline bool is_wide_state(ScalarType dtype, ScalarType state_dtype, const char* state) {
  const bool wide = state_dtype != dtype;
  STD_TORCH_CHECK(!wide || (item_size(dtype) == 2 && state_dtype == ScalarType::Float), "a ",
                  dtype_name(dtype), " parameter has a ", dtype_name(state_dtype), " ", state);
  return wide;
}

}  // namespace fastfreeze
