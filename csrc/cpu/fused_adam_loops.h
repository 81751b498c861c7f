// The update of a run of elements, included once for each instruction set (isa.h).

#include "cpu/convert_loops.h"

template <bool kAmsgrad, typename T>
void update_run(T* __restrict param, T* __restrict grad, T* __restrict mean, T* __restrict square,
                T* __restrict max_square, int64_t n, const AdamHyper<T>& hyper, bool store_grad) {
  constexpr bool kFused = FASTFREEZE_ISA_LEVEL > 0;
  AdamHyper<T> h = hyper;  // a copy that no store below can alias
  if (store_grad) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= hyper.inv_grad_scale;
    h.inv_grad_scale = 1;
  }
  T unused = 0;
  for (int64_t i = 0; i < n; ++i) {
    T g = grad[i];
    T& largest = kAmsgrad ? max_square[i] : unused;
    adam_update<kAmsgrad, kFused>(param[i], g, mean[i], square[i], largest, h);
  }
}

constexpr int64_t kBlock = 512;

// A block of a moment in fp32: where it is, or a copy.
template <typename S>
struct WideBlock {
  S* memory;
  alignas(64) float room[std::is_same_v<S, float> ? 1 : kBlock];

  float* read(int64_t at, int64_t size) {
    if constexpr (std::is_same_v<S, float>) {
      return memory + at;
    } else {
      to_float(memory + at, room, size);
      return room;
    }
  }
  void write(int64_t at, int64_t size) {
    if constexpr (!std::is_same_v<S, float>) from_float(room, memory + at, size);
  }
};

// 16-bit tensors go through small fp32 blocks that stay in the L1 cache, rounded once at the end.
// S is the moments' type: the parameter's, or float.
template <bool kAmsgrad, typename S, typename T>
void update_run16(T* param, T* grad, const Elements& e, const TensorStep& step) {
  alignas(64) float p[kBlock], g[kBlock];
  WideBlock<S> mean, square, max_square;
  mean.memory = static_cast<S*>(e.mean);
  square.memory = static_cast<S*>(e.square);
  max_square.memory = static_cast<S*>(e.max_square);
  for (int64_t at = 0; at < e.size; at += kBlock) {
    const int64_t size = e.size - at < kBlock ? e.size - at : kBlock;
    to_float(param + at, p, size);
    to_float(grad + at, g, size);
    float* largest = kAmsgrad ? max_square.read(at, size) : nullptr;
    update_run<kAmsgrad>(p, g, mean.read(at, size), square.read(at, size), largest, size,
                         step.single, step.store_grad);
    from_float(p, param + at, size);
    if (step.store_grad) from_float(g, grad + at, size);
    mean.write(at, size);
    square.write(at, size);
    if (kAmsgrad) max_square.write(at, size);
  }
}

template <bool kAmsgrad, typename T>
void update_elements(const Elements& e, const TensorStep& step) {
  auto* param = static_cast<T*>(e.param);
  auto* grad = static_cast<T*>(e.grad);
  if constexpr (sizeof(T) == 2) {
    if (e.wide_state) return update_run16<kAmsgrad, float>(param, grad, e, step);
    return update_run16<kAmsgrad, T>(param, grad, e, step);
  } else {
    update_run<kAmsgrad>(param, grad, static_cast<T*>(e.mean), static_cast<T*>(e.square),
                         static_cast<T*>(e.max_square), e.size, step.of<T>(), step.store_grad);
  }
}

template <bool kAmsgrad>
void update_as(const Elements& e, const TensorStep& step) {
  switch (e.dtype) {
    case ScalarType::Float:
      return update_elements<kAmsgrad, float>(e, step);
    case ScalarType::Double:
      return update_elements<kAmsgrad, double>(e, step);
    case ScalarType::Half:
      return update_elements<kAmsgrad, c10::Half>(e, step);
    default:
      return update_elements<kAmsgrad, c10::BFloat16>(e, step);
  }
}

inline void update(const Elements& e, const TensorStep& step) {
  return step.amsgrad ? update_as<true>(e, step) : update_as<false>(e, step);
}
