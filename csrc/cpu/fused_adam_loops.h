// The update of a run of elements, included once for each instruction set (isa.h).

#include "cpu/convert_loops.h"

// What a loop is compiled for: a parameter's first step takes its moments as 0, whatever is there.
template <bool kIsFirst, bool kHasMaximum>
struct Kind {
  static constexpr bool kFirst = kIsFirst, kAmsgrad = kHasMaximum;
};

template <typename K, typename T>
inline T update_one(T& param, T grad, T* mean, T* square, T* max_square, const AdamHyper<T>& h) {
  constexpr bool kFused = FASTFREEZE_ISA_LEVEL > 0;
  T m = K::kFirst ? T(0) : *mean, v = K::kFirst ? T(0) : *square;
  T largest = K::kFirst || !K::kAmsgrad ? T(0) : *max_square;
  adam_update<K::kAmsgrad, kFused>(param, grad, m, v, largest, h);
  *mean = m;
  *square = v;
  if constexpr (K::kAmsgrad) *max_square = largest;
  return grad;
}

template <typename K, typename T>
void update_run(T* __restrict param, T* __restrict grad, T* __restrict mean, T* __restrict square,
                T* __restrict max_square, int64_t n, const AdamHyper<T>& hyper, bool store_grad) {
  const AdamHyper<T> h = hyper;  // a copy that no store below can alias
  if (store_grad) {
    for (int64_t i = 0; i < n; ++i) {
      grad[i] = update_one<K>(param[i], grad[i], mean + i, square + i, max_square + i, h);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      update_one<K>(param[i], grad[i], mean + i, square + i, max_square + i, h);
    }
  }
}

// 16-bit tensors go through small fp32 blocks that stay in the L1 cache, rounded once at the end.
constexpr int64_t kBlock = 512;

// A moment's elements in fp32: where they are, or a copy.
template <typename S>
struct WideMoment {
  S* memory;
  alignas(64) float room[std::is_same_v<S, float> ? 1 : kBlock];

  float* read(int64_t at, int64_t size, bool first) {
    if constexpr (std::is_same_v<S, float>)
      return memory + at;
    else {
      if (!first) to_float(memory + at, room, size);
      return room;
    }
  }
  void write(int64_t at, int64_t size) {
    if constexpr (!std::is_same_v<S, float>) from_float(room, memory + at, size);
  }
};

// S is the moments' type: the parameter's, or float.
template <typename K, typename S, typename T>
void update_run16(T* param, T* grad, const Elements& e, const TensorStep& step) {
  alignas(64) float p[kBlock], g[kBlock];
  WideMoment<S> mean{static_cast<S*>(e.mean)}, square{static_cast<S*>(e.square)},
      max_square{static_cast<S*>(e.max_square)};
  for (int64_t at = 0; at < e.size; at += kBlock) {
    const int64_t size = e.size - at < kBlock ? e.size - at : kBlock;
    to_float(param + at, p, size);
    to_float(grad + at, g, size);
    float* largest = K::kAmsgrad ? max_square.read(at, size, K::kFirst) : nullptr;
    update_run<K>(p, g, mean.read(at, size, K::kFirst), square.read(at, size, K::kFirst), largest,
                  size, step.single, step.store_grad);
    from_float(p, param + at, size);
    if (step.store_grad) from_float(g, grad + at, size);
    mean.write(at, size);
    square.write(at, size);
    if constexpr (K::kAmsgrad) max_square.write(at, size);
  }
}

template <typename K, typename T>
void update_elements(const Elements& e, const TensorStep& step) {
  auto* param = static_cast<T*>(e.param);
  auto* grad = static_cast<T*>(e.grad);
  if constexpr (sizeof(T) == 2) {
    if (e.wide_state) return update_run16<K, float>(param, grad, e, step);
    return update_run16<K, T>(param, grad, e, step);
  } else {
    update_run<K>(param, grad, static_cast<T*>(e.mean), static_cast<T*>(e.square),
                  static_cast<T*>(e.max_square), e.size, step.of<T>(), step.store_grad);
  }
}

template <typename K>
void update_as(const Elements& e, const TensorStep& step) {
  switch (e.dtype) {
    case ScalarType::Float:
      return update_elements<K, float>(e, step);
    case ScalarType::Double:
      return update_elements<K, double>(e, step);
    case ScalarType::Half:
      return update_elements<K, c10::Half>(e, step);
    default:
      return update_elements<K, c10::BFloat16>(e, step);
  }
}

inline void update(const Elements& e, const TensorStep& step) {
  if (step.k == 1) {
    return step.amsgrad ? update_as<Kind<true, true>>(e, step)
                        : update_as<Kind<true, false>>(e, step);
  }
  return step.amsgrad ? update_as<Kind<false, true>>(e, step)
                      : update_as<Kind<false, false>>(e, step);
}
