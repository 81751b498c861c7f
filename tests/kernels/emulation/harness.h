// What a harness needs besides the emulator: named functions of buffers and scalars, which
// tests/kernels/emulation/__init__.py calls in the plain library and in the sanitized programs
// alike.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "float16.h"

namespace emulation {

struct Buffer {
  void* data;  // nullptr: none
  int64_t bytes;
};

struct Scalar {
  int64_t is_real;
  int64_t integer;
  double real;
};

struct Arguments {
  const Buffer* buffers;
  int64_t num_buffers;
  const Scalar* scalars;
  int64_t num_scalars;
  uint64_t seed;

  const Buffer& at(int64_t i) const {
    if (i >= num_buffers) throw std::runtime_error("no buffer " + std::to_string(i));
    return buffers[i];
  }
  template <typename T>
  T* buffer(int64_t i) const {
    return static_cast<T*>(at(i).data);
  }
  int64_t bytes(int64_t i) const { return at(i).bytes; }
  template <typename T>
  int64_t count(int64_t i) const {
    return bytes(i) / static_cast<int64_t>(sizeof(T));
  }

  const Scalar& scalar(int64_t i, bool is_real) const {
    if (i >= num_scalars || (scalars[i].is_real != 0) != is_real) {
      throw std::runtime_error("scalar " + std::to_string(i) + " is not " +
                               (is_real ? "a float" : "an int"));
    }
    return scalars[i];
  }
  int64_t integer(int64_t i) const { return scalar(i, false).integer; }
  double real(int64_t i) const { return scalar(i, true).real; }
};

using Function = void (*)(const Arguments&);

inline std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  return all;
}

// Calls `function` with a value of the type that tests.kernels.emulation.dtype_code names.
template <typename Body>
void with_type(int64_t code, const Body& function) {
  switch (code) {
    case 0:
      return function(float{});
    case 1:
      return function(double{});
    case 2:
      return function(__half{});
    case 3:
      return function(__nv_bfloat16{});
    default:
      throw std::runtime_error("no type " + std::to_string(code));
  }
}

}  // namespace emulation

#define EMULATED(name)                                               \
  static void emulated_##name(const emulation::Arguments& args);     \
  [[maybe_unused]] static const bool name##_is_known =               \
      emulation::functions().emplace(#name, emulated_##name).second; \
  static void emulated_##name([[maybe_unused]] const emulation::Arguments& args)
