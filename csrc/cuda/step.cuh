// One step of any number of tensors and groups in one launch: a warp to each run of elements.
// fastfreeze/kernels/device_plan.py makes the tables, once; a launch brings the gradients'
// addresses. What is done with an element is for a rule: SgdRule, AdamRule.
#pragma once

#ifdef __CUDACC__
#include <cuda/atomic>
#endif

#include "cuda/device.cuh"
#include "schedule_math.h"

namespace fastfreeze {

constexpr int kStepThreads = 128;
constexpr int kGradArguments = 480;  // gradients' addresses that fit a launch's 4 KB of arguments

// A row of the table of runs: the static half of what a warp needs, in 16-byte loads. A run never
// spans two tensors.
template <int kStates>
struct alignas(16) Run {
  int64_t param;           // addresses of the run's first elements
  int64_t state[kStates];  // 0: none
  int32_t tensor;
  int32_t index;  // of the run in its tensor
  int32_t group;
  int32_t size;
};

// Progress: uint8_t, whether a tensor's state has had its first step; or float, its steps.
template <int kStates_, int kColumns_, typename Progress_>
struct StepTables {
  using Progress = Progress_;
  static constexpr int kStates = kStates_;
  static constexpr int kColumns = kColumns_;

  const Run<kStates>* runs;
  const double* hypers;  // [groups, kColumns]
  SegmentTable segments;
  const int32_t* tensor_groups;  // [tensors]
  Progress* progress;            // [tensors]
  int64_t* step;                 // of the next launch
  unsigned* arrived;  // blocks of this launch that have read `progress` and `step`; 0 between two
  int64_t num_runs;
  int32_t run_elements;  // of all runs but a tensor's last
  int32_t num_tensors;

  __device__ const double* hypers_of(int64_t group) const { return hypers + group * kColumns; }
};

struct StepCall {
  const float* found_inf;   // nullptr, or not 0 there: nothing is updated
  const float* grad_scale;  // nullptr, or what the gradients are divided by, in place
  bool track;               // `progress` may change
};

// The gradients' addresses, 0 for none: in the launch's arguments, or in device memory.
struct GradArguments {
  int64_t address[kGradArguments];
  __device__ int64_t operator[](int tensor) const { return address[tensor]; }
};

struct GradTable {
  const int64_t* address;
  __device__ int64_t operator[](int tensor) const { return address[tensor]; }
};

static_assert(sizeof(StepTables<1, 1, float>) + sizeof(GradArguments) + sizeof(StepCall) <= 4096,
              "what a launch's arguments may be");

template <typename P>
using MathOf = std::conditional_t<std::is_same_v<P, double>, double, float>;

__device__ __forceinline__ double inverse_of(const float* grad_scale) {
  return grad_scale == nullptr ? 1.0 : 1.0 / *grad_scale;
}

// The first elements of a run.
template <typename Rule>
struct RunMemory {
  typename Rule::P* param;
  typename Rule::P* grad;
  typename Rule::M* state[Rule::kStates];  // nullptr: none

  __device__ __forceinline__ bool aligned() const {
    bool all = aligned16(param) && aligned16(grad);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) all = all && aligned16(state[s]);
    return all;
  }
};

template <typename Rule>
__device__ __forceinline__ RunMemory<Rule> memory_of(const Run<Rule::kStates>& run, int64_t grad,
                                                     int32_t run_elements) {
  using P = typename Rule::P;
  RunMemory<Rule> memory;
  memory.param = reinterpret_cast<P*>(run.param);
  memory.grad = reinterpret_cast<P*>(grad) + static_cast<int64_t>(run.index) * run_elements;
#pragma unroll
  for (int s = 0; s < Rule::kStates; ++s) {
    memory.state[s] = reinterpret_cast<typename Rule::M*>(run.state[s]);
  }
  return memory;
}

// kUnroll vectors of a run, 32 apart, in a lane's registers. Those from `count` on are not there.
template <typename Rule, int kVec, int kUnroll>
struct Chunk {
  using P = typename Rule::P;
  using M = typename Rule::M;
  using T = typename Rule::T;
  static constexpr int kStates = Rule::kStates;

  Vec<P, kVec> param[kUnroll], grad[kUnroll];
  Vec<M, kVec> state[kUnroll][kStates];

  __device__ __forceinline__ void load(const RunMemory<Rule>& run, int first, int count) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * 32;
      if (i >= count) continue;
      param[u] = load_vec<P, kVec>(run.param + i * kVec);
      grad[u] = load_vec<P, kVec>(run.grad + i * kVec);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (run.state[s] != nullptr) state[u][s] = load_vec<M, kVec>(run.state[s] + i * kVec);
      }
    }
  }

  // Kind: how many of the states there are, and the update of one element.
  template <typename Kind>
  __device__ __forceinline__ void update_element(int u, int v, const Rule& rule) {
    T p = to_math<T>(param[u][v]), g = to_math<T>(grad[u][v]), own[kStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      own[s] = s < Kind::kStates ? to_math<T>(state[u][s][v]) : T(0);
    }
    Kind::update(p, g, own, rule);
    param[u][v] = from_math<P>(p);
    grad[u][v] = from_math<P>(g);
#pragma unroll
    for (int s = 0; s < Kind::kStates; ++s) state[u][s][v] = from_math<M>(own[s]);
  }

  template <typename Kind>
  __device__ __forceinline__ void update(const RunMemory<Rule>& run, int first, int count,
                                         const Rule& rule, bool store_grad) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * 32;
      if (i >= count) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) update_element<Kind>(u, v, rule);
      store_vec(run.param + i * kVec, param[u]);
      if (store_grad) store_vec(run.grad + i * kVec, grad[u]);
#pragma unroll
      for (int s = 0; s < Kind::kStates; ++s) store_vec(run.state[s] + i * kVec, state[u][s]);
    }
  }

  // The vectors from `first` on, which are loaded, and all that follow.
  __device__ __forceinline__ void update_all(const RunMemory<Rule>& run, int first, int count,
                                             const Rule& rule, bool store_grad) {
    for (int i = first; i < count; i += 32 * kUnroll) {
      rule.with_kind([&](auto kind) { update<decltype(kind)>(run, i, count, rule, store_grad); });
      load(run, i + 32 * kUnroll, count);
    }
  }
};

__device__ __forceinline__ uint8_t after_step(uint8_t) { return 1; }
__device__ __forceinline__ float after_step(float steps) { return steps + 1; }

// A warp's work. A frozen layer has no state: should it thaw, its tensors start anew.
template <typename Tables, typename Grads>
__device__ __forceinline__ void track_progress(const Tables& tables, const Grads& grads,
                                               int64_t step, bool skip) {
  for (int i = threadIdx.x % 32; i < tables.num_tensors; i += 32) {
    if (group_frozen(tables.segments, tables.tensor_groups[i], step)) {
      tables.progress[i] = 0;
    } else if (!skip && grads[i] != 0) {
      tables.progress[i] = after_step(tables.progress[i]);
    }
  }
}

using Arrivals = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;

// The first warp's work: of the block that arrived last, when all others have read what it writes.
// before: in thread 0, how many had arrived before its block.
template <typename Tables, typename Grads>
__device__ __forceinline__ void finish_step(const Tables& tables, const Grads& grads,
                                            const StepCall& call, int64_t step, bool skip,
                                            unsigned before) {
  if (__shfl_sync(kAllLanes, before, 0) != gridDim.x - 1) return;
  if (threadIdx.x == 0) {
    cuda::atomic_thread_fence(cuda::memory_order_acquire, cuda::thread_scope_device);
    *tables.step = step + 1;
    Arrivals(*tables.arrived).exchange(0, cuda::memory_order_relaxed);
  }
  __syncwarp();
  if (call.track) track_progress(tables, grads, step, skip);
}

// Elements, hyperparameters and schedule are on their way together. A block arrives before it
// stores anything: neither it nor the last one waits for stores.
template <typename Rule, typename Grads>
__global__ void __launch_bounds__(kStepThreads, Rule::kBlocks)
    step_kernel(const __grid_constant__ typename Rule::Tables tables,
                const __grid_constant__ Grads grads, const __grid_constant__ StepCall call) {
  constexpr int kVec = 16 / sizeof(typename Rule::P);
  const int lane = threadIdx.x % 32;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / 32;
  const int64_t step = *tables.step;
  const bool skip = call.found_inf != nullptr && *call.found_inf != 0;
  const bool store_grad = call.grad_scale != nullptr;
  using RunRow = Run<Rule::kStates>;
  const RunRow run = index < tables.num_runs ? tables.runs[index] : RunRow{};
  const int64_t address = index < tables.num_runs && !skip ? grads[run.tensor] : 0;
  const auto memory = memory_of<Rule>(run, address, tables.run_elements);
  int size = address == 0 ? 0 : run.size;
  int count = memory.aligned() ? size / kVec : 0;
  Chunk<Rule, kVec, Rule::kUnroll> chunk;
  chunk.load(memory, lane, count);
  Rule rule{};
  if (size > 0) {
    rule = Rule::of(tables, call, run, step);
    if (rule.frozen) size = count = 0;
  }
  __syncthreads();
  unsigned before = 0;
  if (threadIdx.x == 0) before = Arrivals(*tables.arrived).fetch_add(1, cuda::memory_order_release);
  chunk.update_all(memory, lane, count, rule, store_grad);
  Chunk<Rule, 1, 4> rest;
  const int done = count * kVec + lane;
  rest.load(memory, done, size);
  rest.update_all(memory, done, size, rule, store_grad);
  if (threadIdx.x < 32) finish_step(tables, grads, call, step, skip, before);
}

}  // namespace fastfreeze
