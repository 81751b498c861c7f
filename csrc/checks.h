// Argument checks shared by the operators. They throw; Python sees a RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastfreeze {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_table(const Tensor& table, const char* name, ScalarType dtype, int64_t columns) {
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

}  // namespace fastfreeze
