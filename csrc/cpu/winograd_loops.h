// Winograd's convolution of a block of tiles, included once for each instruction set (isa.h). Every
// number is the result of one chain of operations that neither the block nor the instruction set's
// width changes.

#include "cpu/vector_math.h"

constexpr int kLane = static_cast<int>(kLanes<float>);

[[gnu::always_inline]] inline FloatVec rectified(FloatVec v) {
  return v < FloatVec{} ? FloatVec{} : v;  // NaN stays
}

// The channels at `c`: all lanes of them, or the first `rest` where the channels end.
struct Channels {
  int64_t c;
  int64_t rest;  // 0: all lanes
  Channels(int64_t begin, int64_t channels)
      : c(begin), rest(channels - begin < kLane ? channels - begin : 0) {}
  FloatVec of(const float* from) const {
    return rest == 0 ? load(from + c) : load_first(from + c, rest, 0.0f);
  }
  void put(float* to, FloatVec v) const {
    if (rest == 0) {
      store(to + c, v);
    } else {
      store_first(to + c, v, rest);
    }
  }
};

// Inputs of a tile: some of its channels, for all of its pixels.
struct Patch {
  const float* data;
  int64_t row;  // distance between rows of pixels
  int64_t pixel;
};

// The six values of a row or column, transformed: B'd.
[[gnu::always_inline]] inline void transform_in(const FloatVec (&d)[kIn], FloatVec (&v)[kIn]) {
  const FloatVec a2 = all(kA * kA), b2 = all(kB * kB), a = all(kA), b = all(kB);
  const FloatVec product = all(kA * kA * kB * kB), sum = all(kA * kA + kB * kB);
  v[0] = mul_add(product, d[0], mul_add(-sum, d[2], d[4]));
  v[5] = mul_add(product, d[1], mul_add(-sum, d[3], d[5]));
  const FloatVec even_a = mul_add(-b2, d[2], d[4]), odd_a = mul_add(-b2, d[1], d[3]);
  const FloatVec even_b = mul_add(-a2, d[2], d[4]), odd_b = mul_add(-a2, d[1], d[3]);
  v[1] = mul_add(a, odd_a, even_a);
  v[2] = mul_add(-a, odd_a, even_a);
  v[3] = mul_add(b, odd_b, even_b);
  v[4] = mul_add(-b, odd_b, even_b);
}

// The four outputs of a row or column: A'm.
[[gnu::always_inline]] inline void transform_out(const FloatVec (&m)[kIn], FloatVec (&y)[kOut]) {
  const FloatVec a = all(kA), b = all(kB), a2 = all(kA * kA), b2 = all(kB * kB);
  const FloatVec a3 = all(kA * kA * kA), b3 = all(kB * kB * kB);
  const FloatVec even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const FloatVec even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = mul_add(b, odd_b, a * odd_a);
  y[2] = mul_add(b2, even_b, a2 * even_a);
  y[3] = mul_add(b3, odd_b, mul_add(a3, odd_a, m[5]));
}

[[gnu::always_inline]] inline void transform_lanes(const Patch& patch, float* v, int64_t plane) {
  FloatVec half[kIn][kIn];
  for (int c = 0; c < kIn; ++c) {
    FloatVec column[kIn], transformed[kIn];
    for (int r = 0; r < kIn; ++r) column[r] = load(patch.data + r * patch.row + c * patch.pixel);
    transform_in(column, transformed);
    for (int r = 0; r < kIn; ++r) half[r][c] = transformed[r];
  }
  for (int r = 0; r < kIn; ++r) {
    FloatVec transformed[kIn];
    transform_in(half[r], transformed);
    for (int c = 0; c < kIn; ++c) store(v + (r * kIn + c) * plane, transformed[c]);
  }
}

// A pixel's channels from `begin` on, scaled and rectified if so wished, and zeros behind the last.
inline void copy_pixel(const WinogradJob& job, const float* pixel, int64_t begin, float* to) {
  const int64_t end = std::min(begin + kPatch, job.channels);
  for (int64_t c = begin; c < end; c += kLane, to += kLane) {
    const Channels at(c, job.channels);
    FloatVec x = at.of(pixel);
    if (job.scale != nullptr) x = rectified(mul_add(x, at.of(job.scale), at.of(job.shift)));
    store(to, x);
  }
}

// A tile's channels from `begin` on, with the padding around the image.
inline Patch copy_patch(const WinogradJob& job, const float* image, int64_t top, int64_t left,
                        int64_t begin, float* room) {
  for (int64_t y = top; y < top + kIn; ++y) {
    for (int64_t x = left; x < left + kIn; ++x) {
      float* to = room + ((y - top) * kIn + (x - left)) * kPatch;
      if (y >= 0 && y < job.height && x >= 0 && x < job.width) {
        copy_pixel(job, image + (y * job.width + x) * job.channels, begin, to);
      } else {
        std::fill_n(to, kPatch, 0.0f);
      }
    }
  }
  return {room, kIn * kPatch, kPatch};
}

inline void transform_input(const WinogradJob& job, const TileBlock& block) {
  alignas(64) float room[kPlanes * kPatch];
  for (int64_t t = 0; t < block.count; ++t) {
    const TilePlace place = job.place_of(block.first + t);
    const int64_t top = place.row - job.pad_h, left = place.column - job.pad_w;
    const float* image = job.input + place.image * job.height * job.width * job.channels;
    const bool in_place = job.scale == nullptr && job.channels % kLane == 0 && top >= 0 &&
                          left >= 0 && top + kIn <= job.height && left + kIn <= job.width;
    float* v = block.v + t * job.v_row();
    for (int64_t begin = 0; begin < job.channels; begin += kPatch) {
      Patch patch = {image + (top * job.width + left) * job.channels + begin,
                     job.width * job.channels, job.channels};
      if (!in_place) patch = copy_patch(job, image, top, left, begin, room);
      const int64_t end = std::min(begin + kPatch, job.channels);
      for (int64_t c = begin; c < end; c += kLane, patch.data += kLane) {
        transform_lanes(patch, v + c, block.v_plane);
      }
    }
  }
}

// How many panels and tiles' sums fit in the registers.
constexpr int kMostPanels = FASTFREEZE_ISA_LEVEL == 2 ? 2 : 1;
constexpr int kMostTiles = FASTFREEZE_ISA_LEVEL == 2 ? 12 : FASTFREEZE_ISA_LEVEL == 1 ? 6 : 2;
constexpr int kPanelVecs = kPanel / kLane;

// What a multiplication reads and writes: distances are between tiles and between panels.
struct Product {
  const float* v;
  int64_t v_row;
  const float* u;
  float* m;
  int64_t m_row;
  int64_t channels;
};

// Unrolled by order, or the sums would take a way through memory.
template <int kTiles, int kPanels>
void multiply_tiles(const Product& p) {
  constexpr int kVecs = kPanels * kPanelVecs;
  FloatVec sums[kTiles][kVecs];
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[t][j] = FloatVec{};
  }
  const float* v = p.v;
  const float* u = p.u;
  const int64_t v_row = p.v_row, channels = p.channels;
  for (int64_t c = 0; c < channels; ++c) {
    FloatVec w[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      w[j] = load(u + j / kPanelVecs * channels * kPanel + c * kPanel + j % kPanelVecs * kLane);
    }
    for (int t = 0; t < kTiles; ++t) {
      const FloatVec x = all(v[t * v_row + c]);
      for (int j = 0; j < kVecs; ++j) sums[t][j] = mul_add(x, w[j], sums[t][j]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(p.m + t * p.m_row + j * kLane, sums[t][j]);
  }
}

using MultiplyFn = void (*)(const Product&);

// For 1, 2, ... kMostTiles tiles.
template <int kPanels, int... kLess>
constexpr std::array<MultiplyFn, sizeof...(kLess)> multiplications(
    std::integer_sequence<int, kLess...>) {
  return {&multiply_tiles<kLess + 1, kPanels>...};
}

template <int kPanels>
void multiply_panels(Product p, int64_t tiles) {
  static constexpr auto kMultiply =
      multiplications<kPanels>(std::make_integer_sequence<int, kMostTiles>());
  while (tiles > 0) {
    const int64_t count = std::min<int64_t>(tiles, kMostTiles);
    kMultiply[count - 1](p);
    p.v += count * p.v_row;
    p.m += count * p.m_row;
    tiles -= count;
  }
}

inline void multiply(const WinogradJob& job, const TileBlock& block) {
  const int64_t panels = job.panels(), panel_size = job.channels * kPanel;
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    for (int64_t panel = 0; panel < panels;) {
      const Product product = {block.v + plane * block.v_plane,
                               job.v_row(),
                               job.weight + (plane * panels + panel) * panel_size,
                               block.m + plane * block.m_plane + panel * kPanel,
                               job.m_row(),
                               job.channels};
      if (panels - panel >= kMostPanels) {
        multiply_panels<kMostPanels>(product, block.count);
        panel += kMostPanels;
      } else {
        multiply_panels<1>(product, block.count);
        ++panel;
      }
    }
  }
}

[[gnu::always_inline]] inline void finish_lanes(const WinogradJob& job, const TilePlace& place,
                                                Channels at, const float* m, int64_t plane) {
  FloatVec half[kOut][kIn];
  for (int c = 0; c < kIn; ++c) {
    FloatVec column[kIn], out[kOut];
    for (int r = 0; r < kIn; ++r) column[r] = load(m + (r * kIn + c) * plane);
    transform_out(column, out);
    for (int r = 0; r < kOut; ++r) half[r][c] = out[r];
  }
  const FloatVec bias = job.bias == nullptr ? FloatVec{} : at.of(job.bias);
  const int64_t rows = std::min<int64_t>(kOut, job.out_height - place.row);
  const int64_t columns = std::min<int64_t>(kOut, job.out_width - place.column);
  for (int64_t r = 0; r < rows; ++r) {
    FloatVec out[kOut];
    transform_out(half[r], out);
    const int64_t pixel =
        ((place.image * job.out_height + place.row + r) * job.out_width + place.column);
    for (int64_t c = 0; c < columns; ++c) {
      FloatVec y = out[c] + bias;
      const int64_t offset = (pixel + c) * job.out_channels;
      if (job.residual != nullptr) y = y + at.of(job.residual + offset);
      at.put(job.output + offset, job.relu ? rectified(y) : y);
    }
  }
}

inline void transform_output(const WinogradJob& job, const TileBlock& block) {
  for (int64_t t = 0; t < block.count; ++t) {
    const TilePlace place = job.place_of(block.first + t);
    const float* m = block.m + t * job.m_row();
    for (int64_t k = 0; k < job.out_channels; k += kLane) {
      finish_lanes(job, place, Channels(k, job.out_channels), m + k, block.m_plane);
    }
  }
}

// A block from input to output.
inline void convolve(const WinogradJob& job, const TileBlock& block) {
  transform_input(job, block);
  multiply(job, block);
  transform_output(job, block);
}
