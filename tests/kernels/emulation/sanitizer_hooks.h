// What the scheduler tells the sanitizers. The build defines EMULATION_ADDRESS or EMULATION_THREAD
// for all parts of a program, and gives -fsanitize only to those that are checked.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <stdexcept>
#include <vector>

#ifdef EMULATION_ADDRESS
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATION_THREAD
#include <sanitizer/tsan_interface.h>
// Public for Java's heaps: memory that is new, whoever touched it before.
extern "C" void __tsan_java_alloc(unsigned long begin, unsigned long size);
extern "C" void __tsan_java_free(unsigned long begin, unsigned long size);
#endif

namespace emulation {

#ifdef EMULATION_THREAD
constexpr bool kWatchesOrder = true;
inline void release(const char* sync) { __tsan_release(const_cast<char*>(sync)); }
inline void acquire(const char* sync) { __tsan_acquire(const_cast<char*>(sync)); }
#else
constexpr bool kWatchesOrder = false;
inline void release(const char*) {}
inline void acquire(const char*) {}
#endif

// Two objects in turn: who runs ahead to the next meeting must not be seen by those who have yet to
// leave this one.
class SyncPair {
 public:
  const char* now() const { return &objects_[turn_]; }
  void turn() { turn_ ^= 1; }

 private:
  char objects_[2] = {};
  unsigned turn_ = 0;
};

// What happens to this memory from now on has nothing to do with what happened before.
inline void renew([[maybe_unused]] void* begin, [[maybe_unused]] size_t size) {
#ifdef EMULATION_THREAD
  const auto address = reinterpret_cast<unsigned long>(begin);
  const unsigned long first = address / 8 * 8, bytes = (address + size + 7) / 8 * 8 - first;
  __tsan_java_free(first, bytes);
  __tsan_java_alloc(first, bytes);
  __tsan_java_free(first, bytes);
#endif
}

// What ThreadSanitizer knows the threads of a launch by: a new identity for every thread of every
// block, so that nothing but atomics and fences orders two blocks. None is given back before the
// end: its successor would have its number, and what the two do would be taken for ordered.
class Identities {
 public:
  Identities() = default;
  Identities(const Identities&) = delete;
#ifdef EMULATION_THREAD
  ~Identities() {
    for (void* identity : all_) __tsan_destroy_fiber(identity);
  }

  void* make(const char* name) {
    if (all_.size() == kMost) {
      throw std::runtime_error("more than 4096 threads in a launch under ThreadSanitizer");
    }
    all_.push_back(__tsan_create_fiber(0));
    __tsan_set_fiber_name(all_.back(), name);
    return all_.back();
  }

 private:
  static constexpr size_t kMost = 4096;  // 3 GB
  std::vector<void*> all_;
#endif
};

struct SanitizerFiber {
#ifdef EMULATION_ADDRESS
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
#endif
#ifdef EMULATION_THREAD
  void* identity = nullptr;
#endif

  // The fiber that runs already.
  void adopt() {
#ifdef EMULATION_ADDRESS
    pthread_attr_t attributes;
    void* begin = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
    stack = begin;
#endif
#ifdef EMULATION_THREAD
    identity = __tsan_get_current_fiber();
#endif
  }

  void start([[maybe_unused]] char* begin, [[maybe_unused]] size_t bytes,
             [[maybe_unused]] Identities& identities, [[maybe_unused]] const char* name) {
#ifdef EMULATION_ADDRESS
    stack = begin;
    size = bytes;
    fake_stack = nullptr;
#endif
#ifdef EMULATION_THREAD
    renew(begin, bytes);
    identity = identities.make(name);
#endif
  }
};

// from: nullptr if it does not come back.
inline void before_switch([[maybe_unused]] SanitizerFiber* from,
                          [[maybe_unused]] const SanitizerFiber& to) {
#ifdef EMULATION_ADDRESS
  __sanitizer_start_switch_fiber(from == nullptr ? nullptr : &from->fake_stack, to.stack, to.size);
#endif
#ifdef EMULATION_THREAD
  __tsan_switch_to_fiber(to.identity, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void after_switch([[maybe_unused]] SanitizerFiber& self) {
#ifdef EMULATION_ADDRESS
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

// AddressSanitizer clears the red zones of a stack whenever a context that names it is entered:
// right for a new stack only.
inline void forget_bounds([[maybe_unused]] ucontext_t& context) {
#ifdef EMULATION_ADDRESS
  context.uc_stack.ss_sp = nullptr;
  context.uc_stack.ss_size = 0;
#endif
}

}  // namespace emulation
