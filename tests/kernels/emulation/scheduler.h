// One launch on the CPU: every CUDA thread of a block is a fiber, blocks run one after the other.
// scheduler.cpp is never compiled with -fsanitize: what it does is not part of the program that is
// checked, and ThreadSanitizer hears of the order that it makes through annotations alone.
#pragma once

#include <cstdint>

namespace emulation {

// Where in the kernel's source a thread waits.
struct Site {
  const char* file;
  int line;
};

enum class Wait { none, syncthreads, syncwarp, shuffle, exited };

struct Launch {
  int64_t grid_x, grid_y, block_x;
  uint64_t seed;  // of the order of blocks, and of threads between synchronisation points
  void (*thread)(void* kernel);  // what each thread runs
  void* kernel;
};

// Throws std::runtime_error where a kernel breaks a rule; the launch is then left as it stands.
void run(const Launch& launch);

// The rest is for a running thread to call.
void barrier(Site site);

// All lanes of `mask` meet. Returns the value of lane `source`.
uint64_t meet(Wait operation, unsigned mask, uint64_t value, unsigned source, Site site);

// To be called before an atomic operation at `address`: it shows what its thread had done before
// its last release_fence; an acquire_fence that follows it sees what others had, before an earlier
// operation there. Nothing else orders two blocks.
void order_atomic(const void* address, Site site);
void release_fence(Site site);
void acquire_fence();

unsigned lane();

[[noreturn]] void fail(const char* what, Site site);

}  // namespace emulation

struct EmulatedIndex {
  unsigned x, y, z;
};

// __shared__ arrays are thread_local: the linker puts them in the order of the objects, between
// scheduler.cpp's and harness_main.cpp's. (With AddressSanitizer they are plain statics instead,
// which alone have red zones.)
extern __thread char shared_begin, shared_end;

extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;
