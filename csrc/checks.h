// Argument checks shared by the operators. They throw; Python sees a RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastfreeze {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_table(const Tensor& table, const char* name, ScalarType dtype, int64_t columns,
                        bool on_cpu = false) {
  STD_TORCH_CHECK(!on_cpu || table.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns, name, " must have shape [n, ",
                  columns, "]");
  STD_TORCH_CHECK(table.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(table.is_contiguous(), name, " must be contiguous");
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "an unsupported dtype";
  }
}

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, " must be float16, bfloat16, float32 or float64");
}

// The dtype of arithmetic on such a tensor, of sums and of statistics.
inline ScalarType sum_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fastfreeze
