// SGD over any number of tensors and groups in one launch: a warp to each run of elements.
// fastfreeze/ops/_device_sgd.py makes the tables, once; a launch brings the gradients' addresses.
#pragma once

#ifdef __CUDACC__
#include <cuda/atomic>
#endif

#include "cuda/device.cuh"
#include "sgd_tables.h"

namespace fastfreeze {

constexpr int kSgdThreads = 128;
constexpr int kSgdArguments = 480;  // gradients' addresses that fit a launch's 4 KB of arguments
// On a multiprocessor at least: 96 registers a thread, or 128. Four have 98 KB on their way to it,
// twice what an H200 needs.
template <typename P>
constexpr int kSgdBlocks = sizeof(P) == 2 ? 5 : 4;

// A row of the table of runs: the static half of what a warp needs, in two 16-byte loads. A run
// never spans two tensors.
struct alignas(16) SgdRun {
  int64_t param;   // addresses of the run's first elements
  int64_t buffer;  // 0: no momentum
  int32_t tensor;
  int32_t index;  // of the run in its tensor
  int32_t group;
  int32_t size;
};

struct SgdTables {
  const SgdRun* runs;
  const double* hypers;  // [groups, kHyperColumns]
  SegmentTable segments;
  const int32_t* tensor_groups;  // [tensors]
  uint8_t* started;              // [tensors]: the momentum buffer has had its first step
  int64_t* step;                 // of the next launch
  unsigned* arrived;  // blocks of this launch that have read `started` and `step`; 0 between two
  int64_t num_runs;
  int32_t run_elements;  // of all runs but a tensor's last
  int32_t num_tensors;
};

struct SgdCall {
  const float* found_inf;   // nullptr, or not 0 there: nothing is updated
  const float* grad_scale;  // nullptr, or what the gradients are divided by, in place
  bool track;               // `started` may change
};

// The gradients' addresses, 0 for none: in the launch's arguments, or in device memory.
struct GradArguments {
  int64_t address[kSgdArguments];
  __device__ int64_t operator[](int tensor) const { return address[tensor]; }
};

struct GradTable {
  const int64_t* address;
  __device__ int64_t operator[](int tensor) const { return address[tensor]; }
};

static_assert(sizeof(SgdTables) + sizeof(GradArguments) + sizeof(SgdCall) <= 4096,
              "what a launch's arguments may be");

template <typename P>
using SgdMath = std::conditional_t<std::is_same_v<P, double>, double, float>;

// The first elements of a run.
template <typename P, typename M>
struct RunMemory {
  P* param;
  P* grad;
  M* buffer;  // nullptr: no momentum
};

// What a run's step depends on beside its elements.
template <typename T>
struct RunStep {
  SgdHyper<T> hyper;
  Momentum momentum;
  bool frozen;
};

template <Momentum kMomentum, typename P, typename M>
__device__ __forceinline__ void update_one(P& param, P& grad, M& buffer,
                                           const SgdHyper<SgdMath<P>>& hyper) {
  using T = SgdMath<P>;
  T p = to_math<T>(param), g = to_math<T>(grad);
  T b = kMomentum == Momentum::running ? to_math<T>(buffer) : T(0);
  sgd_update<kMomentum, true>(p, g, b, hyper);
  param = from_math<P>(p);
  grad = from_math<P>(g);
  if (kMomentum != Momentum::none) buffer = from_math<M>(b);
}

// kUnroll vectors of a run, 32 apart, in a lane's registers. Those from `count` on are not there.
template <typename P, typename M, int kVec, int kUnroll>
struct Chunk {
  Vec<P, kVec> param[kUnroll], grad[kUnroll];
  Vec<M, kVec> buffer[kUnroll];

  __device__ __forceinline__ void load(const RunMemory<P, M>& run, int first, int count) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * 32;
      if (i >= count) continue;
      param[u] = load_vec<P, kVec>(run.param + i * kVec);
      grad[u] = load_vec<P, kVec>(run.grad + i * kVec);
      if (run.buffer != nullptr) buffer[u] = load_vec<M, kVec>(run.buffer + i * kVec);
    }
  }

  template <Momentum kMomentum>
  __device__ __forceinline__ void update(const RunMemory<P, M>& run, int first, int count,
                                         const SgdHyper<SgdMath<P>>& hyper, bool store_grad) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * 32;
      if (i >= count) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        update_one<kMomentum>(param[u][v], grad[u][v], buffer[u][v], hyper);
      }
      store_vec(run.param + i * kVec, param[u]);
      if (store_grad) store_vec(run.grad + i * kVec, grad[u]);
      if (kMomentum != Momentum::none) store_vec(run.buffer + i * kVec, buffer[u]);
    }
  }

  __device__ __forceinline__ void update(const RunMemory<P, M>& run, int first, int count,
                                         const RunStep<SgdMath<P>>& step, bool store_grad) {
    if (step.momentum == Momentum::none) {
      update<Momentum::none>(run, first, count, step.hyper, store_grad);
    } else if (step.momentum == Momentum::first) {
      update<Momentum::first>(run, first, count, step.hyper, store_grad);
    } else {
      update<Momentum::running>(run, first, count, step.hyper, store_grad);
    }
  }

  // The vectors from `first` on, which are loaded, and all that follow.
  __device__ __forceinline__ void update_all(const RunMemory<P, M>& run, int first, int count,
                                             const RunStep<SgdMath<P>>& step, bool store_grad) {
    for (int i = first; i < count; i += 32 * kUnroll) {
      update(run, i, count, step, store_grad);
      load(run, i + 32 * kUnroll, count);
    }
  }
};

// All that one load tells where to find is asked for before the schedule is worked out.
template <typename T>
__device__ __forceinline__ RunStep<T> step_of(const SgdTables& tables, const SgdCall& call,
                                              const SgdRun& run, int64_t step) {
  const double* row = tables.hypers + static_cast<int64_t>(run.group) * kHyperColumns;
  const bool first = run.buffer != 0 && tables.started[run.tensor] == 0;
  const double inv_scale = call.grad_scale == nullptr ? 1.0 : 1.0 / *call.grad_scale;
  SgdHyper<T> hyper = hyper_of<T>(row, 0.0, inv_scale);
  const GroupRate rate = group_rate(tables.segments, run.group, row[kLr], row[kInitialLr], step);
  hyper.lr = static_cast<T>(rate.lr);
  const Momentum momentum = first ? Momentum::first : Momentum::running;
  return {hyper, run.buffer == 0 ? Momentum::none : momentum, rate.frozen};
}

// A warp's work. A frozen layer has no momentum: should it thaw, its buffers start anew.
template <typename Grads>
__device__ __forceinline__ void track_started(const SgdTables& tables, const Grads& grads,
                                              int64_t step, bool skip) {
  for (int i = threadIdx.x % 32; i < tables.num_tensors; i += 32) {
    if (group_frozen(tables.segments, tables.tensor_groups[i], step)) {
      tables.started[i] = 0;
    } else if (!skip && grads[i] != 0) {
      tables.started[i] = 1;
    }
  }
}

using SgdArrivals = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;

// The first warp's work: of the block that arrived last, when all others have read what it writes.
// before: in thread 0, how many had arrived before its block.
template <typename Grads>
__device__ __forceinline__ void finish_step(const SgdTables& tables, const Grads& grads,
                                            const SgdCall& call, int64_t step, bool skip,
                                            unsigned before) {
  if (__shfl_sync(kAllLanes, before, 0) != gridDim.x - 1) return;
  if (threadIdx.x == 0) {
    cuda::atomic_thread_fence(cuda::memory_order_acquire, cuda::thread_scope_device);
    *tables.step = step + 1;
    SgdArrivals(*tables.arrived).exchange(0, cuda::memory_order_relaxed);
  }
  __syncwarp();
  if (call.track) track_started(tables, grads, step, skip);
}

// Elements, hyperparameters and schedule are on their way together. A block arrives before it
// stores anything: neither it nor the last one waits for stores.
template <typename P, typename M, typename Grads>
__global__ void __launch_bounds__(kSgdThreads, kSgdBlocks<P>)
    sgd_kernel(const __grid_constant__ SgdTables tables, const __grid_constant__ Grads grads,
               const __grid_constant__ SgdCall call) {
  constexpr int kVec = 16 / sizeof(P);
  constexpr int kUnroll = sizeof(P) == 2 ? 2 : 4;  // 16-bit elements take twice their registers
  const int lane = threadIdx.x % 32;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kSgdThreads + threadIdx.x) / 32;
  const int64_t step = *tables.step;
  const bool skip = call.found_inf != nullptr && *call.found_inf != 0;
  const bool store_grad = call.grad_scale != nullptr;
  const SgdRun run = index < tables.num_runs ? tables.runs[index] : SgdRun{};
  const int64_t address = index < tables.num_runs && !skip ? grads[run.tensor] : 0;
  const RunMemory<P, M> memory{
      reinterpret_cast<P*>(run.param),
      reinterpret_cast<P*>(address) + static_cast<int64_t>(run.index) * tables.run_elements,
      reinterpret_cast<M*>(run.buffer)};
  int size = address == 0 ? 0 : run.size;
  const bool aligned =
      aligned16(memory.param) && aligned16(memory.grad) && aligned16(memory.buffer);
  int count = aligned ? size / kVec : 0;
  Chunk<P, M, kVec, kUnroll> chunk;
  chunk.load(memory, lane, count);
  RunStep<SgdMath<P>> run_step{};
  if (size > 0) {
    run_step = step_of<SgdMath<P>>(tables, call, run, step);
    if (run_step.frozen) size = count = 0;
  }
  __syncthreads();
  unsigned before = 0;
  if (threadIdx.x == 0) {
    before = SgdArrivals(*tables.arrived).fetch_add(1, cuda::memory_order_release);
  }
  chunk.update_all(memory, lane, count, run_step, store_grad);
  Chunk<P, M, 1, 4> rest;
  const int done = count * kVec + lane;
  rest.load(memory, done, size);
  rest.update_all(memory, done, size, run_step, store_grad);
  if (threadIdx.x < 32) finish_step(tables, grads, call, step, skip, before);
}

}  // namespace fastfreeze
