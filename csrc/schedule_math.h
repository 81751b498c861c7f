// The learning rate of a schedule's segment: the only place in C++ where the formula stands.
// The same as fastfreeze.schedule.cosine_lr: operation for operation on the host, and but for the
// last bit of the cosine on a device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTFREEZE_HOST_DEVICE __host__ __device__
#else
#define FASTFREEZE_HOST_DEVICE
#endif

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

}  // namespace fastfreeze
