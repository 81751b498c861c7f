// The learning rate of a schedule's segment: the only place in C++ where the formula stands.
// The same as fastfreeze.schedule.cosine_lr: operation for operation on the host, and but for the
// last bit of the cosine on a device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace fastfreeze {

struct Segment {
  double start;   // first step
  double length;  // steps from the maximum to the minimum; infinite: constant; 0: frozen
  double scale;   // factor on the group's initial learning rate
};

// cos(pi x), x in 0..1. CUDA's cos would need local memory for the angles that it is not given.
FASTFREEZE_HOST_DEVICE inline double cos_pi(double x) {
#ifdef __CUDA_ARCH__
  return cospi(x);
#else
  return cos(3.141592653589793 * x);
#endif
}

FASTFREEZE_HOST_DEVICE inline double segment_lr(const Segment& segment, double step,
                                                double initial_lr, double eta_min,
                                                double warmup_steps) {
  if (segment.length == 0) return 0.0;
  const double elapsed = (step - segment.start) / segment.length;
  const double phase = elapsed < 1.0 ? elapsed : 1.0;
  const double factor = 0.5 * (1.0 + cos_pi(phase));
  const double lr = eta_min + (segment.scale * initial_lr - eta_min) * factor;
  return step + 1.0 < warmup_steps ? lr * ((step + 1.0) / warmup_steps) : lr;
}

// The last of `count` >= 1 segments, sorted by start, that has begun at `step`.
FASTFREEZE_HOST_DEVICE inline const Segment& segment_at(const Segment* segments, int64_t count,
                                                        double step) {
  int64_t i = count - 1;
  while (i > 0 && segments[i].start > step) --i;
  return segments[i];
}

// The segments of all groups; those of group g are begin[g] .. begin[g + 1]. None: no schedule.
struct SegmentTable {
  const Segment* segments;
  const int64_t* begin;
  double eta_min;
  double warmup_steps;
};

struct GroupRate {
  double lr;
  bool frozen;
};

FASTFREEZE_HOST_DEVICE inline const Segment* segment_of(const SegmentTable& table, int64_t group,
                                                        double step) {
  const int64_t begin = table.begin[group];
  const int64_t count = table.begin[group + 1] - begin;
  return count == 0 ? nullptr : &segment_at(as_global(table.segments) + begin, count, step);
}

FASTFREEZE_HOST_DEVICE inline bool group_frozen(const SegmentTable& table, int64_t group,
                                                int64_t step) {
  const Segment* segment = segment_of(table, group, static_cast<double>(step));
  return segment != nullptr && segment->length == 0;
}

// lr counts where there is no schedule, initial_lr where there is one; the other is not read.
FASTFREEZE_HOST_DEVICE inline GroupRate group_rate(const SegmentTable& table, int64_t group,
                                                   const double& lr, const double& initial_lr,
                                                   int64_t step) {
  const double at = static_cast<double>(step);
  const Segment* segment = segment_of(table, group, at);
  if (segment == nullptr) return {lr, false};
  const double scheduled = segment_lr(*segment, at, initial_lr, table.eta_min, table.warmup_steps);
  return {scheduled, segment->length == 0};
}

}  // namespace fastfreeze
