// relu(x * scale + shift) per channel of one tensor, or of several as if side by side, in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/images.h"
#include "cpu/isa.h"
#include "host_device.h"

namespace fastfreeze {
namespace {

constexpr int64_t kElementsPerThread =
    32768;  // below this a second thread costs more than it saves

// A tensor's rows: the channels of a pixel or, not channels_last, the pixels of a channel.
struct Part {
  const void* data;
  int64_t stride;  // elements from one row to the next
  int64_t channels;
};

struct AffineJob {
  std::vector<Part> parts;
  const void* scale;  // [channels], of the type of arithmetic, as the shift
  const void* shift;
  void* out;
  ScalarType dtype;
  bool channels_last;
  bool relu;
  int64_t channels;  // of all parts
  int64_t pixels;    // of an image
};

#define FASTFREEZE_LOOPS "cpu/affine_loops.h"
#include "cpu/each_isa.h"

using RowsFn = void (*)(const AffineJob&, int64_t, int64_t);

RowsFn rows_for(Isa isa) { return FASTFREEZE_OF_ISA(isa, affine_rows); }

// Copies a part that has no rows of the wanted kind; `copies` keeps it.
Part part_of(const Tensor& t, bool channels_last, std::vector<Tensor>& copies) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t channels = t.size(1), stride = pixel_stride(t);
  if (channels_last && stride >= 0) return {data, stride, channels};
  copies.push_back(torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
  return {copies.back().const_data_ptr(), channels_last ? channels : t.size(2) * t.size(3),
          channels};
}

// An empty list does not get here: it has no device to dispatch on.
void check_parts(const std::vector<Tensor>& parts) {
  const Tensor& first = parts[0];
  check_floating(first, "parts");
  for (const Tensor& t : parts) {
    STD_TORCH_CHECK(t.dim() == 4, "parts must be images [N, C, H, W]");
    STD_TORCH_CHECK(t.size(0) == first.size(0) && t.size(2) == first.size(2) &&
                        t.size(3) == first.size(3) && t.scalar_type() == first.scalar_type() &&
                        t.is_cpu(),
                    "parts must differ in nothing but their channels");
  }
}

Tensor affine_relu_cat(std::vector<Tensor> parts, Tensor scale, Tensor shift, bool channels_last,
                       bool relu) {
  check_parts(parts);
  const Tensor& first = parts[0];
  AffineJob job;
  std::vector<Tensor> copies;
  job.channels = 0;
  for (const Tensor& t : parts) {
    if (t.size(1) == 0) continue;
    job.parts.push_back(part_of(t, channels_last, copies));
    job.channels += t.size(1);
  }
  job.pixels = first.size(2) * first.size(3);
  job.dtype = first.scalar_type(), job.channels_last = channels_last, job.relu = relu;
  job.scale = checked_channels(scale, "scale", job.channels, sum_dtype(first));
  job.shift = checked_channels(shift, "shift", job.channels, sum_dtype(first));
  Tensor out = new_images(first, {first.size(0), job.channels, first.size(2), first.size(3)},
                          channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;
  job.out = out.mutable_data_ptr();
  const int64_t row = channels_last ? job.channels : job.pixels;
  const RowsFn affine_rows = rows_for(current_isa());
  torch::stable::parallel_for(0, out.numel() / row, std::max<int64_t>(1, kElementsPerThread / row),
                              [&](int64_t begin, int64_t end) { affine_rows(job, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CPU, m) {
  m.impl("affine_relu_cat", TORCH_BOX(&fastfreeze::affine_relu_cat));
}
