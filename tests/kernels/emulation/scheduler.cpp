#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizer_hooks.h"

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

__thread char shared_begin;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10;  // the sanitizers write their reports on it
constexpr size_t kGuard = 4096;
constexpr size_t kMaxFences = 1 << 14;

struct Fiber {
  ucontext_t context;
  SanitizerFiber sanitizer;
  char* stack = nullptr;
  unsigned thread = 0;
  // What it waits for, and what it brings there.
  Wait wait = Wait::none;
  unsigned mask = 0;
  Site site = {};
  uint64_t value = 0;
  unsigned source = 0;
  uint64_t result = 0;
  const char* fence = nullptr;  // the last that released; nullptr: none
  // Of its last atomic operation: where, and how much had been published before.
  const void* seen_at = nullptr;
  size_t num_seen = 0;
};

struct Publication {
  const void* address;
  const char* fence;
};

// Everything that fibers touch is allocated before they run: the sanitizers watch malloc.
struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Fiber caller;  // of run()
  Fiber* current = nullptr;
  Launch launch = {};
  std::vector<unsigned> runnable = std::vector<unsigned>(kMaxThreads);
  unsigned num_runnable = 0, num_arrived = 0, num_exited = 0;
  char end = 0;  // of the kernel
  // Of __syncthreads, and then, by the first lane of the mask, of the warps' operations.
  std::vector<SyncPair> syncs = std::vector<SyncPair>(1 + kMaxThreads);
  std::vector<char> fences = std::vector<char>(kMaxFences);
  std::vector<Publication> published = std::vector<Publication>(kMaxFences);
  size_t num_fences = 0, num_published = 0;
  uint64_t random = 0;
  char error[512] = {};
};

Machine& machine() {
  static Machine instance;
  return instance;
}

// splitmix64
uint64_t draw(Machine& m, uint64_t bound) {
  uint64_t z = m.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return (z ^ (z >> 31)) % bound;
}

// Returns when another fiber switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to) {
  if (&from == &to) return;
  machine().current = &to;
  threadIdx.x = to.thread;
  before_switch(from.wait == Wait::exited ? nullptr : &from.sanitizer, to.sanitizer);
  swapcontext(&from.context, &to.context);
  after_switch(from.sanitizer);
}

void wake(Machine& m, Fiber& fiber) {
  fiber.wait = Wait::none;
  m.runnable[m.num_runnable++] = fiber.thread;
}

// Goes on with any runnable fiber; with none, the block has ended or is stuck.
void suspend(Machine& m, Fiber& self) {
  if (m.num_runnable == 0) return switch_fiber(self, m.caller);
  unsigned& slot = m.runnable[draw(m, m.num_runnable)];
  Fiber& next = m.fibers[slot];
  slot = m.runnable[--m.num_runnable];
  switch_fiber(self, next);
}

void thread_main() {
  Machine& m = machine();
  Fiber& self = *m.current;
  after_switch(self.sanitizer);
  forget_bounds(self.context);
  m.launch.thread(m.launch.kernel);
  self.wait = Wait::exited;
  ++m.num_exited;
  release(&m.end);
  suspend(m, self);
}

void allocate_stack(Fiber& fiber) {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    throw std::runtime_error("no memory for the stack of a thread");
  }
  fiber.stack = static_cast<char*>(memory) + kGuard;
}

void start_fiber(Fiber& fiber, unsigned thread, Identities& identities) {
  if (fiber.stack == nullptr) allocate_stack(fiber);
  fiber.thread = thread;
  fiber.wait = Wait::none;
  fiber.fence = nullptr;
  fiber.seen_at = nullptr;
  fiber.num_seen = 0;
  char name[64];
  std::snprintf(name, sizeof name, "block (%u, %u) thread %u", blockIdx.x, blockIdx.y, thread);
  fiber.sanitizer.start(fiber.stack, kStack, identities, name);
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::syncthreads:
      return "__syncthreads";
    case Wait::syncwarp:
      return "__syncwarp";
    case Wait::shuffle:
      return "a shuffle";
    default:
      return "";
  }
}

std::string describe(const Fiber& fiber) {
  if (fiber.wait == Wait::exited) return "exited";
  char mask[32] = "";
  if (fiber.wait != Wait::syncthreads) {
    std::snprintf(mask, sizeof mask, " of lanes %#x", fiber.mask);
  }
  const char* file = std::strrchr(fiber.site.file, '/');
  return std::string("wait at ") + name_of(fiber.wait) + mask + " in " +
         (file == nullptr ? fiber.site.file : file + 1) + ":" + std::to_string(fiber.site.line);
}

// "0-4, 6", the first few of the threads that `what` describes.
std::string threads_that(const Machine& m, const std::string& what) {
  std::string text;
  int ranges = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (describe(m.fibers[t]) != what) continue;
    const unsigned first = t;
    while (t + 1 < blockDim.x && describe(m.fibers[t + 1]) == what) ++t;
    if (++ranges > 4) return text + ", ...";
    text += (ranges > 1 ? ", " : "") + std::to_string(first);
    if (t > first) text += "-" + std::to_string(t);
  }
  return text;
}

// Who waits for whom when no thread can go on.
std::string describe_stuck(const Machine& m) {
  bool block_wide = false;
  std::vector<std::string> found;
  for (unsigned t = 0; t < blockDim.x; ++t) {
    block_wide |= m.fibers[t].wait == Wait::syncthreads;
    const std::string what = describe(m.fibers[t]);
    if (std::find(found.begin(), found.end(), what) == found.end()) found.push_back(what);
  }
  std::string text = block_wide ? "divergent barrier" : "divergent warp operation";
  text += " in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ") of " +
          std::to_string(blockDim.x) + " threads:";
  for (const std::string& what : found)
    text += " threads " + threads_that(m, what) + " " + what + ";";
  text.pop_back();
  return text;
}

void renew_shared_memory() {
  renew(&shared_begin, static_cast<size_t>(&shared_end - &shared_begin));
  for (char* p = &shared_begin; p < &shared_end; ++p) *p = static_cast<char>(0xff);  // NaN
}

void run_block(Machine& m, Identities& identities) {
  const unsigned count = blockDim.x;
  m.num_runnable = m.num_arrived = m.num_exited = 0;
  renew(m.syncs.data(), m.syncs.size() * sizeof(SyncPair));
  for (unsigned t = 0; t < count; ++t) {
    start_fiber(m.fibers[t], t, identities);
    wake(m, m.fibers[t]);
  }
  suspend(m, m.caller);
  if (m.error[0] != '\0') acquire(&m.end);
  std::string error = m.error;
  if (error.empty() && m.num_exited < count) error = describe_stuck(m);
  if (!error.empty()) throw std::runtime_error(error);
}

bool same_operation(const Fiber& a, const Fiber& b) {
  return a.wait == b.wait && a.mask == b.mask && a.site.line == b.site.line &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

// The lanes of self's mask have all come to the operation where self is.
bool complete(const Machine& m, const Fiber& self) {
  const unsigned first = self.thread / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((self.mask >> i & 1) == 0) continue;
    if (first + i >= blockDim.x || !same_operation(m.fibers[first + i], self)) return false;
  }
  return true;
}

void exchange(Machine& m, const Fiber& self) {
  Fiber* lanes = &m.fibers[self.thread / kWarp * kWarp];
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((self.mask >> i & 1) == 0) continue;
    if ((self.mask >> lanes[i].source & 1) == 0) {
      fail("a lane reads one outside the mask", self.site);
    }
    lanes[i].result = lanes[lanes[i].source].value;
  }
}

std::vector<uint64_t> shuffled_blocks(Machine& m) {
  std::vector<uint64_t> order(m.launch.grid_x * m.launch.grid_y);
  for (uint64_t i = 0; i < order.size(); ++i) {
    const uint64_t j = draw(m, i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  return order;
}

}  // namespace

void run(const Launch& launch) {
  if (launch.grid_x < 1 || launch.grid_x > INT32_MAX || launch.grid_y < 1 ||
      launch.grid_y > UINT16_MAX || launch.block_x < 1 || launch.block_x > kMaxThreads) {
    throw std::runtime_error("a grid of " + std::to_string(launch.grid_x) + " x " +
                             std::to_string(launch.grid_y) + " blocks of " +
                             std::to_string(launch.block_x) + " threads cannot be launched");
  }
  Machine& m = machine();
  m.launch = launch;
  m.random = launch.seed;
  m.num_fences = m.num_published = 0;
  m.error[0] = '\0';
  m.caller.sanitizer.adopt();
  gridDim = {static_cast<unsigned>(launch.grid_x), static_cast<unsigned>(launch.grid_y), 1};
  blockDim = {static_cast<unsigned>(launch.block_x), 1, 1};
  Identities identities;
  for (const uint64_t block : shuffled_blocks(m)) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x),
                0};
    renew_shared_memory();
    run_block(m, identities);
  }
  acquire(&m.end);
}

void barrier(Site site) {
  Machine& m = machine();
  Fiber& self = *m.current;
  self.wait = Wait::syncthreads;
  self.mask = 0;
  self.site = site;
  const char* sync = m.syncs[0].now();
  release(sync);
  const unsigned count = blockDim.x;
  if (++m.num_arrived == count &&
      std::all_of(m.fibers.begin(), m.fibers.begin() + count,
                  [&](const Fiber& other) { return same_operation(other, self); })) {
    m.num_arrived = 0;
    m.syncs[0].turn();
    for (unsigned t = 0; t < count; ++t) wake(m, m.fibers[t]);
  }
  suspend(m, self);
  acquire(sync);
}

uint64_t meet(Wait operation, unsigned mask, uint64_t value, unsigned source, Site site) {
  Machine& m = machine();
  Fiber& self = *m.current;
  if ((mask >> lane() & 1) == 0) fail("a lane is not in the mask that it names", site);
  self.wait = operation;
  self.mask = mask;
  self.site = site;
  self.value = value;
  self.source = source;
  const unsigned first = self.thread / kWarp * kWarp;
  SyncPair& pair = m.syncs[1 + first + static_cast<unsigned>(__builtin_ctz(mask))];
  const char* sync = pair.now();
  if (operation == Wait::syncwarp) release(sync);  // no other operation orders memory
  if (complete(m, self)) {
    exchange(m, self);
    pair.turn();
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) != 0) wake(m, m.fibers[first + i]);
    }
  }
  suspend(m, self);
  if (operation == Wait::syncwarp) acquire(sync);
  return self.result;
}

void release_fence(Site site) {
  Machine& m = machine();
  if (!kWatchesOrder) return;
  if (m.num_fences == kMaxFences) fail("more fences than the emulation keeps", site);
  m.current->fence = &m.fences[m.num_fences++];
  release(m.current->fence);
}

void acquire_fence() {
  Machine& m = machine();
  if (!kWatchesOrder) return;
  for (size_t i = 0; i < m.current->num_seen; ++i) {
    if (m.published[i].address == m.current->seen_at) acquire(m.published[i].fence);
  }
}

void order_atomic(const void* address, Site site) {
  Machine& m = machine();
  if (!kWatchesOrder) return;
  Fiber& self = *m.current;
  self.seen_at = address;
  self.num_seen = m.num_published;
  bool known = self.fence == nullptr;
  for (size_t i = 0; i < m.num_published; ++i) {
    known |= m.published[i].address == address && m.published[i].fence == self.fence;
  }
  if (known) return;
  if (m.num_published == kMaxFences) fail("more fences than the emulation keeps", site);
  m.published[m.num_published++] = {address, self.fence};
}

unsigned lane() { return threadIdx.x % kWarp; }

void fail(const char* what, Site site) {
  Machine& m = machine();
  std::snprintf(m.error, sizeof m.error, "block (%u, %u), thread %u: %s (%s:%d)", blockIdx.x,
                blockIdx.y, threadIdx.x, what, site.file, site.line);
  release(&m.end);
  switch_fiber(*m.current, m.caller);
  __builtin_unreachable();
}

}  // namespace emulation
