// Small kernels, each right and, with kBroken, wrong in one way: proof that the checkers see it.
#include "cuda_emulation.h"
#include "harness.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAllLanes = 0xffffffffu;

template <bool kBroken>
__global__ void reads_past_the_end(float* out, const float* x, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) out[i] = x[i] + x[kBroken ? i + 1 : i];
}

template <bool kBroken>
__global__ void writes_past_the_end(float* out, const float* x, int n) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = 2 * x[i];
  if (kBroken && i == n - 1) out[i + 1] = 0;
}

template <bool kBroken>
__global__ void misses_a_barrier(float* out, const float* x, int) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  if (!kBroken) __syncthreads();
  out[i] = tile[kThreads - 1 - i];
}

// The barrier between a read and the next write of the same place.
template <bool kBroken>
__global__ void misses_the_second_barrier(float* out, const float* x, int n) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[i] = x[i] * static_cast<float>(round);
    __syncthreads();
    sum += tile[(i + 1) % n];
    if (!kBroken) __syncthreads();
  }
  out[i] = sum;
}

template <bool kBroken>
__global__ void leaves_before_a_barrier(float* out, const float* x, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (kBroken && i >= n - 3) return;
  __syncthreads();
  out[i] = x[i];
}

template <bool kBroken>
__global__ void takes_another_barrier(float* out, const float* x, int) {
  const int i = static_cast<int>(threadIdx.x);
  if (kBroken && i % 2 == 0) {
    __syncthreads();
  } else if (kBroken) {
    __syncthreads();
  }
  __syncthreads();
  out[i] = x[i];
}

template <bool kBroken>
__global__ void misses_a_warp_barrier(float* out, const float* x, int) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  if (!kBroken) __syncwarp();
  out[i] = tile[i ^ 1];
}

template <bool kBroken>
__global__ void shuffles_with_the_gone(float* out, const float* x, int) {
  const int i = static_cast<int>(threadIdx.x);
  if (kBroken && i % 32 == 5) return;
  out[i] = __shfl_xor_sync(kAllLanes, x[i], 1);
}

template <bool kBroken>
__global__ void shuffles_outside_the_mask(float* out, const float* x, int) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = x[i];
  if (i % 32 < 16) out[i] = __shfl_xor_sync(0xffffu, x[i], kBroken ? 16 : 8);
}

template <bool kBroken>
__global__ void is_not_in_its_mask(float* out, const float* x, int) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = __shfl_sync(kBroken ? 0xffffu : kAllLanes, x[i], 0);
}

template <bool kBroken>
__global__ void loads_misaligned(float* out, const float* x, int n) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i + 4 >= n) return;
  const uint4 v = *reinterpret_cast<const uint4*>(x + i + (kBroken ? 1 : 0));
  *reinterpret_cast<uint4*>(out + i) = v;
}

template <bool kBroken>
__global__ void overflows_shared(float* out, const float* x, int n) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  float* place = tile + (kBroken && i == n - 1 ? n : i);
  *place = x[i];
  __syncthreads();
  out[i] = tile[i];
}

template <bool kBroken>
__global__ void reads_unwritten_shared(float* out, const float* x, int) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  if (!kBroken || i != 7) tile[i] = x[i];
  __syncthreads();
  out[i] = tile[(i + 1) % kThreads];
}

template <bool kBroken>
__global__ void blocks_count_themselves(float* out, unsigned* finished, float*, const float*) {
  if (threadIdx.x != 0) return;
  if (kBroken) {
    *finished += 1;
  } else {
    cuda::atomic_ref<unsigned, cuda::thread_scope_device>(*finished).fetch_add(
        1, cuda::memory_order_relaxed);
  }
}

// The block that arrives last reads what the others wrote, if the atomic releases what comes before
// it, and it or a fence acquires what others have released.
template <cuda::memory_order kOrder, bool kFence>
__global__ void last_block_adds(float* out, unsigned* finished, float* parts, const float* x) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = x[blockIdx.x];
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(*finished);
  if (counter.fetch_add(1, kOrder) != gridDim.x - 1) return;
  if (kFence) cuda::atomic_thread_fence(cuda::memory_order_acquire, cuda::thread_scope_device);
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  *out = sum;
  counter.exchange(0, cuda::memory_order_relaxed);
}

// A write that comes between the release and the atomic is not released.
template <bool kBroken>
__global__ void releases_too_early(float* out, unsigned* finished, float* parts, const float* x) {
  if (threadIdx.x != 0) return;
  if (!kBroken) parts[blockIdx.x] = x[blockIdx.x];
  cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_device);
  if (kBroken) parts[blockIdx.x] = x[blockIdx.x];
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(*finished);
  if (counter.fetch_add(1, cuda::memory_order_acquire) != gridDim.x - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  *out = sum;
  counter.exchange(0, cuda::memory_order_relaxed);
}

using Kernel = void (*)(float*, const float*, int);

// Buffers: out, x. Scalars: broken.
void launch(const emulation::Arguments& args, Kernel right, Kernel broken) {
  const auto n = static_cast<int>(args.count<float>(1));
  emulation::emulate(1, 1, kThreads, args.seed, args.integer(0) != 0 ? broken : right,
                     args.buffer<float>(0), args.buffer<const float>(1), n);
}

using GridKernel = void (*)(float*, unsigned*, float*, const float*);

// Buffers: out, finished, parts, x. Scalars: broken.
void launch_grid(const emulation::Arguments& args, GridKernel right, GridKernel broken) {
  emulation::emulate(args.count<float>(3), 1, kThreads, args.seed,
                     args.integer(0) != 0 ? broken : right, args.buffer<float>(0),
                     args.buffer<unsigned>(1), args.buffer<float>(2), args.buffer<const float>(3));
}

}  // namespace

#define SEEDED(name) \
  EMULATED(name) { launch(args, name<false>, name<true>); }

SEEDED(reads_past_the_end)
SEEDED(writes_past_the_end)
SEEDED(misses_a_barrier)
SEEDED(misses_the_second_barrier)
SEEDED(leaves_before_a_barrier)
SEEDED(takes_another_barrier)
SEEDED(misses_a_warp_barrier)
SEEDED(shuffles_with_the_gone)
SEEDED(shuffles_outside_the_mask)
SEEDED(is_not_in_its_mask)
SEEDED(loads_misaligned)
SEEDED(overflows_shared)
SEEDED(reads_unwritten_shared)

EMULATED(blocks_count_themselves) {
  launch_grid(args, blocks_count_themselves<false>, blocks_count_themselves<true>);
}
EMULATED(releases_alone) {
  launch_grid(args, last_block_adds<cuda::memory_order_release, true>,
              last_block_adds<cuda::memory_order_release, false>);
}
EMULATED(acquires_alone) {
  launch_grid(args, last_block_adds<cuda::memory_order_acq_rel, false>,
              last_block_adds<cuda::memory_order_acquire, false>);
}
EMULATED(releases_too_early) {
  launch_grid(args, releases_too_early<false>, releases_too_early<true>);
}
