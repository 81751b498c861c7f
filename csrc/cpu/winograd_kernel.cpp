// 3x3 convolutions by Winograd's F(4x4, 3x3): each tile of 4x4 outputs takes 36 multiplications for
// each pair of channels instead of 144.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/images.h"
#include "cpu/isa.h"

namespace fastfreeze {
namespace {

constexpr int kOut = 4;             // a tile's outputs in each direction,
constexpr int kIn = 6;              // its inputs,
constexpr int kPlanes = kIn * kIn;  // and its products for each pair of channels
constexpr int kPanel = 16;          // output channels that lie together in the weight

// The interpolation points are 0, +-kA, +-kB and infinity. These are less usual than 1 and 2, but
// lose about a quarter as much to rounding: no more than a plain fp32 sum. All constants that come
// of them are exact.
constexpr float kA = 0.75f;
constexpr float kB = 1.5f;

constexpr int64_t kPatch = 64;                 // channels of a tile that are copied at a time
constexpr int64_t kScratch = 112 * 1024;       // floats of a block: half of an L2 cache
constexpr int64_t kLargeWeight = 1024 * 1024;  // floats
constexpr int64_t kTilesOfLargeWeight = 96;
constexpr int64_t kTileStep = 12;  // a multiple of what the registers hold
constexpr int64_t kProductsPerThread =
    1 << 20;  // below this a second thread costs more than it saves

// A tile's image, and its first output there.
struct TilePlace {
  int64_t image;
  int64_t row;
  int64_t column;
};

struct WinogradJob {
  const float* input;
  const float* weight;  // [kPlanes, panels, channels, kPanel]
  const float* bias;    // null for none, as the next three; scale and shift go together
  const float* residual;
  const float* scale;
  const float* shift;
  float* output;
  int64_t images, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t pad_h, pad_w;
  bool relu;

  int64_t panels() const { return (out_channels + kPanel - 1) / kPanel; }
  int64_t tile_rows() const { return (out_height + kOut - 1) / kOut; }
  int64_t tile_columns() const { return (out_width + kOut - 1) / kOut; }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
  int64_t v_row() const { return (channels + kPanel - 1) / kPanel * kPanel; }
  int64_t m_row() const { return panels() * kPanel; }
  TilePlace place_of(int64_t tile) const {
    const int64_t column = tile % tile_columns(), rest = tile / tile_columns();
    return {rest / tile_rows(), rest % tile_rows() * kOut, column * kOut};
  }
};

// Tiles in work, and the scratch for them: kPlanes of transformed inputs [count, v_row] and of
// products [count, m_row].
struct TileBlock {
  int64_t first;
  int64_t count;
  float* v;
  int64_t v_plane;
  float* m;
  int64_t m_plane;
};

#define FASTFREEZE_LOOPS "cpu/winograd_loops.h"
#include "cpu/each_isa.h"

using ConvolveFn = void (*)(const WinogradJob&, const TileBlock&);

ConvolveFn convolve_for(Isa isa) { return FASTFREEZE_OF_ISA(isa, convolve); }

// An odd number of cache lines: the planes of one tile lie in different sets of a cache.
int64_t plane_size(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

int64_t scratch_size(const WinogradJob& job, int64_t tiles) {
  return kPlanes * (plane_size(tiles * job.v_row()) + plane_size(tiles * job.m_row()));
}

TileBlock block_at(const WinogradJob& job, float* scratch, int64_t tiles, int64_t first) {
  const int64_t v_plane = plane_size(tiles * job.v_row());
  return {first,   std::min(tiles, job.tiles() - first), scratch,
          v_plane, scratch + kPlanes * v_plane,          plane_size(tiles * job.m_row())};
}

// Tiles of a block: the scratch fits in an L2 cache, unless the weight does not: then there are so
// many that the multiplications hide its way from memory.
int64_t tiles_in_block(const WinogradJob& job) {
  const int64_t weight = kPlanes * job.channels * job.m_row();
  if (weight >= kLargeWeight) return kTilesOfLargeWeight;
  const int64_t tiles = kScratch / (kPlanes * (job.v_row() + job.m_row()));
  return std::max<int64_t>(tiles / kTileStep, 1) * kTileStep;
}

// Each thread takes blocks of its own from input to output.
void run(const WinogradJob& job, const Tensor& like) {
  const int64_t products = job.tiles() * kPlanes * job.channels * job.m_row();
  const int64_t wanted = std::max<int64_t>(1, products / kProductsPerThread);
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), wanted);
  const int64_t share = ((job.tiles() + threads - 1) / threads + kTileStep - 1) / kTileStep;
  const int64_t tiles = std::min(tiles_in_block(job), share * kTileStep);
  const int64_t blocks = (job.tiles() + tiles - 1) / tiles;
  threads = std::min(threads, blocks);
  const int64_t size = scratch_size(job, tiles);
  Tensor scratch = torch::stable::new_empty(like, std::vector<int64_t>{threads * size});
  float* base = scratch.mutable_data_ptr<float>();
  const ConvolveFn convolve = convolve_for(current_isa());
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t b = blocks * thread / threads; b < blocks * (thread + 1) / threads; ++b) {
        convolve(job, block_at(job, base + thread * size, tiles, b * tiles));
      }
    }
  };
  if (threads == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

const float* checked_floats(const std::optional<Tensor>& t, const char* name, int64_t channels) {
  if (!t.has_value()) return nullptr;
  return static_cast<const float*>(checked_channels(*t, name, channels, ScalarType::Float));
}

// Images as channels_last, which `t` becomes if it is not.
const float* checked_images(Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) >= 1, name, " must be images [N, C, H, W]");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu(), name,
                  " must be float32 and on the CPU");
  t = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  return t.const_data_ptr<float>();
}

// The rows of a transformed weight, one for each output channel, together hold all planes.
const float* checked_weight(const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= 1 && t.scalar_type() == ScalarType::Float &&
                      t.is_cpu() && t.is_contiguous(),
                  "transformed must be what transform_weight() gives");
  const int64_t panels = (t.size(0) + kPanel - 1) / kPanel;
  const int64_t floats = kPlanes * panels * channels * kPanel;
  STD_TORCH_CHECK(t.size(1) == (floats + t.size(0) - 1) / t.size(0),
                  "transformed is not for input of ", channels, " channels");
  return t.const_data_ptr<float>();
}

Tensor winograd_conv2d(Tensor input, Tensor transformed, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, int64_t pad_h, int64_t pad_w, bool relu) {
  STD_TORCH_CHECK(pad_h >= 0 && pad_h <= 1 && pad_w >= 0 && pad_w <= 1,
                  "padding must be 0 or 1, got (", pad_h, ", ", pad_w, ")");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                  "input_scale and input_shift must both be given, or neither");
  WinogradJob job;
  job.input = checked_images(input, "input");
  job.images = input.size(0), job.channels = input.size(1);
  job.height = input.size(2), job.width = input.size(3);
  job.weight = checked_weight(transformed, job.channels);
  job.out_channels = transformed.size(0);
  job.pad_h = pad_h, job.pad_w = pad_w, job.relu = relu;
  job.out_height = job.height + 2 * pad_h - 2, job.out_width = job.width + 2 * pad_w - 2;
  STD_TORCH_CHECK(job.out_height >= 1 && job.out_width >= 1, "input of ", job.height, "x",
                  job.width, " pixels is too small for padding (", pad_h, ", ", pad_w, ")");
  job.bias = checked_floats(bias, "bias", job.out_channels);
  job.scale = checked_floats(scale, "input_scale", job.channels);
  job.shift = checked_floats(shift, "input_shift", job.channels);
  const std::vector<int64_t> shape = {job.images, job.out_channels, job.out_height, job.out_width};
  STD_TORCH_CHECK(!residual.has_value() || std::ranges::equal(residual->sizes(), shape),
                  "residual must have the shape of the result");
  job.residual = residual.has_value() ? checked_images(*residual, "residual") : nullptr;
  Tensor output = new_images(input, shape, MemoryFormat::ChannelsLast);
  job.output = output.mutable_data_ptr<float>();
  if (job.images > 0) run(job, input);
  return output;
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&fastfreeze::winograd_conv2d));
}
