// The part of CUDA C++ that csrc/cuda/*.cuh may use, for g++: kernels run on the CPU. (clang takes
// it too, but does not see that a vector is misaligned.)
//
// An emulation, not a GPU run. It checks what a kernel computes, what it touches and what orders
// its accesses; it says nothing of speed, of registers, or of the last bit of CUDA's own expf.
// Stricter than a GPU: a block's threads must all come to every __syncthreads, a mask's lanes to
// every warp operation, at one place in the source; only __syncthreads and __syncwarp order the
// memory of a block's threads; only a fence and then an atomic, there an atomic and then a fence,
// order that of two blocks.
// Blocks run one after the other, in any order: a kernel may not wait for another block.
// ThreadSanitizer remembers the last few accesses to a place: a race with one of many readers can
// go unseen. Let some blocks read what others do not.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "float16.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#ifdef EMULATION_ADDRESS
#define __shared__ static  // a red zone around each
#else
#define __shared__ static thread_local  // the scheduler finds them, and fills them with NaN
#endif

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet(Wait::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Between two synchronisation points nothing else runs: to be atomic it need only look it.
template <typename T, typename Function>
T update_atomic(T* address, Site site, const Function& function) {
  order_atomic(address, site);
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, function(old), __ATOMIC_RELAXED);
  return old;
}

// One launch: `kernel` with `args`, converted to its parameters, in each thread.
template <typename... Parameters, typename... Args>
void emulate(int64_t grid_x, int64_t grid_y, int64_t block_x, uint64_t seed,
             void (*kernel)(Parameters...), const Args&... args) {
  using Values = std::tuple<Parameters...>;
  struct Call {
    void (*kernel)(Parameters...);
    Values values;
  } call{kernel, Values(static_cast<Parameters>(args)...)};
  const auto thread = [](void* context) {
    const auto& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.values);
  };
  run({grid_x, grid_y, block_x, seed, thread, &call});
}

}  // namespace emulation

inline void __syncthreads(EMULATION_SITE) { emulation::barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::meet(emulation::Wait::syncwarp, mask, 0, emulation::lane(), {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  return emulation::shuffle(mask, value, static_cast<unsigned>(source) % 32, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, EMULATION_SITE) {
  const unsigned source = emulation::lane() ^ static_cast<unsigned>(distance);
  return emulation::shuffle(mask, value, source, {file, line});
}

namespace cuda {

enum thread_scope { thread_scope_device };
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire = 1,
  memory_order_release = 2,
  memory_order_acq_rel = 3
};

inline void atomic_thread_fence(memory_order order, thread_scope, EMULATION_SITE) {
  if ((order & memory_order_release) != 0) emulation::release_fence({file, line});
  if ((order & memory_order_acquire) != 0) emulation::acquire_fence();
}

template <typename T, thread_scope kScope>
class atomic_ref {
 public:
  explicit atomic_ref(T& value) : address_(&value) {}

  T fetch_add(T value, memory_order order, EMULATION_SITE) const {
    return update(order, {file, line}, [&](T old) { return old + value; });
  }

  T exchange(T value, memory_order order, EMULATION_SITE) const {
    return update(order, {file, line}, [&](T) { return value; });
  }

 private:
  template <typename Function>
  T update(memory_order order, emulation::Site site, const Function& function) const {
    if ((order & memory_order_release) != 0) emulation::release_fence(site);
    const T old = emulation::update_atomic(address_, site, function);
    if ((order & memory_order_acquire) != 0) emulation::acquire_fence();
    return old;
  }

  T* address_;
};

}  // namespace cuda

#undef EMULATION_SITE
