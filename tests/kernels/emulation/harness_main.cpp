// Calls a harness's functions: for ctypes where it is a library, from a file where it is a program.
// The file is written by tests/kernels/emulation/__init__.py (_packed).
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "harness.h"
#include "scheduler.h"

__thread char shared_end;

// nullptr, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* emulation_call(
    const char* name, const emulation::Arguments* args) {
  static std::string error;
  const auto function = emulation::functions().find(name);
  try {
    if (function == emulation::functions().end()) throw std::runtime_error("no such function");
    function->second(*args);
    return nullptr;
  } catch (const std::exception& exception) {
    error = std::string(name) + ": " + exception.what();
    return error.c_str();
  }
}

#ifdef EMULATION_PROGRAM

namespace {

struct Input {
  std::ifstream stream;

  int64_t integer() {
    int64_t value = 0;
    bytes(&value, sizeof value);
    return value;
  }
  void bytes(void* data, int64_t size) {
    if (!stream.read(static_cast<char*>(data), size)) throw std::runtime_error("a short case file");
  }
};

// A block that ends with the buffer's last byte: one more is an error.
emulation::Buffer read_buffer(Input& input) {
  const int64_t size = input.integer(), misalignment = input.integer();
  if (size == 0) return {nullptr, 0};
  auto* data = static_cast<char*>(std::malloc(misalignment + size)) + misalignment;
  input.bytes(data, size);
  return {data, size};
}

// An address in one buffer of a place in another.
void relocate(Input& input, const std::vector<emulation::Buffer>& buffers) {
  const int64_t table = input.integer(), index = input.integer();
  const int64_t target = input.integer(), offset = input.integer();
  static_cast<int64_t*>(buffers.at(table).data)[index] =
      reinterpret_cast<int64_t>(buffers.at(target).data) + offset;
}

int run_case(const char* case_path, const char* result_path) {
  Input input{std::ifstream(case_path, std::ios::binary)};
  std::string name(input.integer(), '\0');
  input.bytes(name.data(), static_cast<int64_t>(name.size()));
  const auto seed = static_cast<uint64_t>(input.integer());
  std::vector<emulation::Buffer> buffers(input.integer());
  for (auto& buffer : buffers) buffer = read_buffer(input);
  for (int64_t i = input.integer(); i > 0; --i) relocate(input, buffers);
  std::vector<emulation::Scalar> scalars(input.integer());
  for (auto& scalar : scalars) input.bytes(&scalar, sizeof scalar);
  const emulation::Arguments args{buffers.data(), static_cast<int64_t>(buffers.size()),
                                  scalars.data(), static_cast<int64_t>(scalars.size()), seed};
  if (const char* error = emulation_call(name.c_str(), &args)) {
    std::fprintf(stderr, "emulation error: %s\n", error);
    return 2;
  }
  std::ofstream result(result_path, std::ios::binary);
  for (const auto& buffer : buffers) result.write(static_cast<char*>(buffer.data), buffer.bytes);
  return result.good() ? 0 : 1;
}

}  // namespace

int main(int, char** arguments) { return run_case(arguments[1], arguments[2]); }

#endif
