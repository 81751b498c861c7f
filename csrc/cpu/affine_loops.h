// x * scale + shift, then perhaps ReLU, of rows, included once for each instruction set (isa.h).

#include "cpu/convert_loops.h"

// kStep: 1 where each element has its scale and shift, 0 where all have the first.
template <int kStep, bool kRelu, typename T>
void affine_run(const T* x, const T* __restrict scale, const T* __restrict shift, T* y, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T z = mul_add<(FASTFREEZE_ISA_LEVEL > 0)>(x[i], scale[i * kStep], shift[i * kStep]);
    y[i] = kRelu && z < 0 ? 0 : z;  // NaN stays
  }
}

// T is the type of arithmetic. 16-bit elements go through fp32 blocks that stay in the L1 cache.
template <int kStep, bool kRelu, typename T, typename In>
void affine_row(const AffineJob& job, const In* x, int64_t channel, In* y, int64_t n) {
  const T* scale = static_cast<const T*>(job.scale) + channel;
  const T* shift = static_cast<const T*>(job.shift) + channel;
  if constexpr (std::is_same_v<T, In>) {
    affine_run<kStep, kRelu>(x, scale, shift, y, n);
  } else {
    constexpr int64_t kBlock = 512;
    alignas(64) float room[kBlock];
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t size = std::min(kBlock, n - at), of = at * kStep;
      to_float(x + at, room, size);
      affine_run<kStep, kRelu>(room, scale + of, shift + of, room, size);
      from_float(room, y + at, size);
    }
  }
}

// The channels of a pixel, of all parts side by side.
template <typename In>
void gather(const AffineJob& job, int64_t row, In* room) {
  for (const Part& part : job.parts) {
    const In* x = static_cast<const In*>(part.data) + row * part.stride;
    std::memcpy(room, x, part.channels * sizeof(In));
    room += part.channels;
  }
}

// Rows of pixels.
template <bool kRelu, typename T, typename In>
void affine_pixels(const AffineJob& job, int64_t begin, int64_t end) {
  std::vector<In> room(job.parts.size() > 1 ? job.channels : 0);
  for (int64_t row = begin; row < end; ++row) {
    const In* x = static_cast<const In*>(job.parts[0].data) + row * job.parts[0].stride;
    if (!room.empty()) {
      gather(job, row, room.data());
      x = room.data();
    }
    In* y = static_cast<In*>(job.out) + row * job.channels;
    affine_row<1, kRelu, T>(job, x, 0, y, job.channels);
  }
}

// Rows of planes: the pixels of a channel.
template <bool kRelu, typename T, typename In>
void affine_planes(const AffineJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / job.channels, channel = row % job.channels;
    size_t p = 0;
    int64_t within = channel;
    for (; within >= job.parts[p].channels; ++p) within -= job.parts[p].channels;
    const Part& part = job.parts[p];
    const int64_t plane = image * part.channels + within;
    const In* x = static_cast<const In*>(part.data) + plane * part.stride;
    In* y = static_cast<In*>(job.out) + row * job.pixels;
    affine_row<0, kRelu, T>(job, x, channel, y, job.pixels);
  }
}

template <bool kRelu, typename T, typename In>
void affine_rows_of(const AffineJob& job, int64_t begin, int64_t end) {
  if (job.channels_last) {
    affine_pixels<kRelu, T, In>(job, begin, end);
  } else {
    affine_planes<kRelu, T, In>(job, begin, end);
  }
}

template <bool kRelu>
void affine_rows_typed(const AffineJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case ScalarType::Float:
      return affine_rows_of<kRelu, float, float>(job, begin, end);
    case ScalarType::Double:
      return affine_rows_of<kRelu, double, double>(job, begin, end);
    case ScalarType::Half:
      return affine_rows_of<kRelu, float, c10::Half>(job, begin, end);
    default:
      return affine_rows_of<kRelu, float, c10::BFloat16>(job, begin, end);
  }
}

inline void affine_rows(const AffineJob& job, int64_t begin, int64_t end) {
  if (job.relu) {
    affine_rows_typed<true>(job, begin, end);
  } else {
    affine_rows_typed<false>(job, begin, end);
  }
}
