// SGD over any number of tensors and groups in one launch: a warp to each run of elements.
// fastfreeze/ops/_device_sgd.py makes the tables, once; a launch brings the gradients' addresses.
#pragma once

#include "cuda/device.cuh"
#include "sgd_tables.h"

namespace fastfreeze {

constexpr int kSgdRun = 2048;  // elements to a warp; a run never spans two tensors
constexpr int kSgdThreads = 128;
constexpr int kSgdBlocks = 5;       // on a multiprocessor at least: up to 96 registers a thread
constexpr int kSgdArguments = 480;  // gradients' addresses that fit a launch's 4 KB of arguments

// A row of the table of runs. The static half of what a warp needs comes in two 16-byte loads.
struct alignas(16) SgdRun {
  int64_t param;   // addresses of the run's first elements
  int64_t buffer;  // 0: no momentum
  int32_t tensor;
  int32_t index;  // of the run in its tensor
  int32_t group;
  int32_t size;
};

struct GroupState {
  double lr;
  double frozen;  // 0 or 1
};

struct SgdTables {
  const SgdRun* runs;
  const double* hypers;  // [groups, kHyperColumns]
  GroupState* states;    // [groups], of the step that comes next
  SegmentTable segments;
  const int32_t* tensor_groups;  // [tensors]
  uint8_t* started;              // [tensors]: the momentum buffer has had its first step
  int64_t* step;
  unsigned* finished;  // blocks of this launch that are done; 0 between launches
  int64_t num_runs;
  int32_t num_tensors;
  int32_t num_groups;
  bool scheduled;  // else the learning rates are the hyperparameters', and `states` say nothing
};

struct SgdCall {
  const float* found_inf;   // nullptr, or not 0 there: nothing is updated
  const float* grad_scale;  // nullptr, or what the gradients are divided by, in place
  bool track;  // who has started, and which groups are frozen, is known to the device alone
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

template <typename P>
using SgdMath = std::conditional_t<std::is_same_v<P, double>, double, float>;

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

// kUnroll vectors 32 apart, all loads before the first use. kFull: none is past the end.
template <Momentum kMomentum, bool kFull, int kUnroll, typename P, typename M>
__device__ __forceinline__ void update_vectors(P* param, P* grad, M* buffer, int first, int count,
                                               const SgdHyper<SgdMath<P>>& hyper, bool store_grad) {
  constexpr int kVec = 16 / sizeof(P);
  Vec<P, kVec> p[kUnroll], g[kUnroll];
  Vec<M, kVec> b[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = first + u * 32;
    if (!kFull && i >= count) continue;
    p[u] = load_vec<P, kVec>(param + i * kVec);
    g[u] = load_vec<P, kVec>(grad + i * kVec);
    if (kMomentum == Momentum::running) b[u] = load_vec<M, kVec>(buffer + i * kVec);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = first + u * 32;
    if (!kFull && i >= count) continue;
#pragma unroll
    for (int v = 0; v < kVec; ++v) update_one<kMomentum>(p[u][v], g[u][v], b[u][v], hyper);
    store_vec(param + i * kVec, p[u]);
    if (store_grad) store_vec(grad + i * kVec, g[u]);
    if (kMomentum != Momentum::none) store_vec(buffer + i * kVec, b[u]);
  }
}

template <Momentum kMomentum, typename P, typename M>
__device__ __forceinline__ void update_elements(P* param, P* grad, M* buffer, int size,
                                                const SgdHyper<SgdMath<P>>& hyper,
                                                bool store_grad) {
  constexpr int kVec = 16 / sizeof(P);
  constexpr int kUnroll = sizeof(P) == 2 ? 2 : 4;  // 16-bit elements take twice their registers
  const int lane = threadIdx.x % 32;
  int done = 0;
  if (aligned16(param) && aligned16(grad) && aligned16(buffer)) {
    const int count = size / kVec;
    if (size == kSgdRun) {
      for (int i = lane; i < kSgdRun / kVec; i += 32 * kUnroll) {
        update_vectors<kMomentum, true, kUnroll>(param, grad, buffer, i, count, hyper, store_grad);
      }
    } else {
      for (int i = lane; i < count; i += 32 * kUnroll) {
        update_vectors<kMomentum, false, kUnroll>(param, grad, buffer, i, count, hyper, store_grad);
      }
    }
    done = count * kVec;
  }
#pragma unroll 4
  for (int i = done + lane; i < size; i += 32) {
    P p = *as_global(param + i), g = *as_global(grad + i);
    M b = kMomentum == Momentum::running ? *as_global(buffer + i) : from_math<M>(0.0f);
    update_one<kMomentum>(p, g, b, hyper);
    *as_global(param + i) = p;
    if (store_grad) *as_global(grad + i) = g;
    if (kMomentum != Momentum::none) *as_global(buffer + i) = b;
  }
}

template <typename P, typename M, typename Grads>
__device__ __forceinline__ void update_run(const SgdTables& tables, const Grads& grads,
                                           const SgdCall& call, int64_t index) {
  const SgdRun run = tables.runs[index];
  const int64_t address = grads[run.tensor];
  const double* row = tables.hypers + static_cast<int64_t>(run.group) * kHyperColumns;
  const GroupState state = tables.scheduled ? tables.states[run.group] : GroupState{row[kLr], 0.0};
  if (address == 0 || state.frozen != 0) return;
  const double inv_scale = call.grad_scale == nullptr ? 1.0 : 1.0 / *call.grad_scale;
  const auto hyper = hyper_of<SgdMath<P>>(row, state.lr, inv_scale);
  const bool store_grad = call.grad_scale != nullptr;
  P* param = reinterpret_cast<P*>(run.param);
  P* grad = reinterpret_cast<P*>(address) + static_cast<int64_t>(run.index) * kSgdRun;
  M* buffer = reinterpret_cast<M*>(run.buffer);
  if (run.buffer == 0) {
    update_elements<Momentum::none>(param, grad, buffer, run.size, hyper, store_grad);
  } else if (tables.started[run.tensor] == 0) {
    update_elements<Momentum::first>(param, grad, buffer, run.size, hyper, store_grad);
  } else {
    update_elements<Momentum::running>(param, grad, buffer, run.size, hyper, store_grad);
  }
}

__device__ __forceinline__ void set_states(const SgdTables& tables, int64_t step) {
  if (!tables.scheduled) return;
  for (int g = threadIdx.x; g < tables.num_groups; g += blockDim.x) {
    const double* row = tables.hypers + static_cast<int64_t>(g) * kHyperColumns;
    const GroupRate rate = group_rate(tables.segments, g, row, step);
    tables.states[g] = {rate.lr, rate.frozen ? 1.0 : 0.0};
  }
}

// A frozen layer has no momentum: should it thaw, its buffers start anew.
template <typename Grads>
__device__ __forceinline__ void track_started(const SgdTables& tables, const Grads& grads,
                                              bool skip) {
  for (int i = threadIdx.x; i < tables.num_tensors; i += blockDim.x) {
    if (tables.scheduled && tables.states[tables.tensor_groups[i]].frozen != 0) {
      tables.started[i] = 0;
    } else if (!skip && grads[i] != 0) {
      tables.started[i] = 1;
    }
  }
}

// The block that ends last, when all others have read what it writes, prepares the next launch.
template <typename Grads>
__device__ __forceinline__ void finish_step(const SgdTables& tables, const Grads& grads,
                                            const SgdCall& call, bool skip) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(tables.finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (call.track) track_started(tables, grads, skip);
  const int64_t next = *tables.step + 1;
  __syncthreads();
  set_states(tables, next);
  if (threadIdx.x == 0) *tables.step = next;
}

template <typename P, typename M, typename Grads>
__global__ void __launch_bounds__(kSgdThreads, kSgdBlocks)
    sgd_kernel(const __grid_constant__ SgdTables tables, const __grid_constant__ Grads grads,
               const __grid_constant__ SgdCall call) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSgdThreads + threadIdx.x;
  const bool skip = call.found_inf != nullptr && *call.found_inf != 0;
  if (!skip && thread / 32 < tables.num_runs) {
    update_run<P, M>(tables, grads, call, thread / 32);
  }
  finish_step(tables, grads, call, skip);
}

// One block: the tables as they are before `step`.
__global__ void __launch_bounds__(kSgdThreads)
    sgd_seek_kernel(const __grid_constant__ SgdTables tables, int64_t step) {
  set_states(tables, step);
  if (threadIdx.x == 0) *tables.step = step;
}

}  // namespace fastfreeze
