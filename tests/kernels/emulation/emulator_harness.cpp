// Kernels that show what the emulator itself does; tests/kernels/test_emulation.py knows what they
// give.
#include "cuda_emulation.h"
#include "harness.h"

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Rows of `out`: xor and absolute, each of x by `amount`.
template <typename T>
__global__ void shuffles(T* out, const T* x, int amount) {
  const unsigned i = threadIdx.x;
  out[i] = __shfl_xor_sync(kAllLanes, x[i], amount);
  out[blockDim.x + i] = __shfl_sync(kAllLanes, x[i], amount);
}

// Each half of a warp by itself, in as many rounds as its lowest lane says.
__global__ void half_warps(int* out, const int* rounds) {
  const int i = static_cast<int>(threadIdx.x);
  const unsigned mask = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = 0;
  for (int r = 0; r < rounds[i / 16]; ++r) sum += __shfl_xor_sync(mask, i, 1 << r % 4);
  out[i] = sum;
}

__global__ void indices(int64_t* out) {
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = blockIdx.x + 100 * blockIdx.y + 10000 * threadIdx.x;
}

// The order in which threads come to the atomic: any, by the seed. The last one sets it to 7.
__global__ void order(unsigned* counter, unsigned* place) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> all(*counter);
  place[i] = all.fetch_add(1, cuda::memory_order_relaxed);
  if (place[i] == gridDim.x * blockDim.x - 1) all.exchange(7, cuda::memory_order_relaxed);
}

// Tables of addresses: out[i] = *table[i], or -1.
__global__ void follow(int64_t* out, const int64_t* const* table, int stride) {
  const int64_t* place = table[threadIdx.x * static_cast<unsigned>(stride)];
  out[threadIdx.x] = place == nullptr ? -1 : *place;
}

}  // namespace

EMULATED(shuffle) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    emulation::emulate(1, 1, 64, args.seed, shuffles<T>, args.buffer<T>(0), args.buffer<const T>(1),
                       args.integer(1));
  };
  switch (args.integer(0)) {
    case 0:
      return run(float{});
    case 1:
      return run(double{});
    case 2:
      return run(int{});
    default:
      return run(int64_t{});
  }
}

EMULATED(half_warp) {
  emulation::emulate(1, 1, 64, args.seed, half_warps, args.buffer<int>(0), args.buffer<int>(1));
}

// Of 40 threads, whose second warp has lanes that the mask names and the block does not have.
EMULATED(half_block) {
  const auto kernel = +[](int* out) { out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0); };
  emulation::emulate(1, 1, args.count<int>(0), args.seed, kernel, args.buffer<int>(0));
}

EMULATED(order_of_threads) {
  emulation::emulate(4, 1, 32, args.seed, order, args.buffer<unsigned>(0),
                     args.buffer<unsigned>(1));
}

EMULATED(follow) {
  emulation::emulate(1, 1, args.count<int64_t>(0), args.seed, follow, args.buffer<int64_t>(0),
                     args.buffer<const int64_t*>(1), args.integer(0));
}

// Address modulo 16 and size of each buffer after the first.
EMULATED(describe) {
  auto* out = args.buffer<int64_t>(0);
  for (int64_t i = 1; i < args.num_buffers; ++i) {
    *out++ = reinterpret_cast<int64_t>(args.buffer<char>(i)) % 16;
    *out++ = args.bytes(i);
  }
}

// The last two bytes of buffer 0.
EMULATED(write_last) {
  auto* last = args.buffer<uint16_t>(0) + args.count<uint16_t>(0) - 1;
  emulation::emulate(1, 1, 1, args.seed, +[](uint16_t* to) { *to = 7; }, last);
}

EMULATED(launch) {
  emulation::emulate(args.integer(0), args.integer(1), args.integer(2), args.seed, indices,
                     args.buffer<int64_t>(0));
}
