// Batches of images [N, C, H, W]. In channels_last ones the channels of a pixel lie together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace fastfreeze {

using torch::headeronly::MemoryFormat;

inline Tensor new_images(const Tensor& like, const std::vector<int64_t>& shape,
                         MemoryFormat format) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format);
}

// Distance between the pixels if a pixel's channels lie together, and pixels evenly, else -1.
inline int64_t pixel_stride(const Tensor& t) {
  if (t.size(1) != 1 && t.stride(1) != 1) return -1;
  int64_t stride = t.size(1);
  int64_t outer = -1;  // the stride that continues the dimensions seen so far
  for (const int64_t d : {3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (outer < 0) stride = t.stride(d);
    if (outer >= 0 && t.stride(d) != outer) return -1;
    outer = t.stride(d) * t.size(d);
  }
  return stride;
}

// A vector with a number for each channel.
inline const void* checked_channels(const Tensor& t, const char* name, int64_t channels,
                                    ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, " must have shape [", channels, "]");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  return t.const_data_ptr();
}

}  // namespace fastfreeze
