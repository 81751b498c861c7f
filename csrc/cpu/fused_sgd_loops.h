// The update of a run of elements, included once for each instruction set (isa.h).

#include "cpu/convert_loops.h"

template <Momentum kMomentum, typename T>
void update_run(T* __restrict param, T* __restrict grad, T* __restrict buffer, int64_t n,
                const SgdHyper<T>& hyper, bool store_grad) {
  constexpr bool kFused = FASTFREEZE_ISA_LEVEL > 0;
  const SgdHyper<T> h = hyper;  // a copy that no store below can alias
  T unused = 0;
  if (store_grad) {
    for (int64_t i = 0; i < n; ++i) {
      T& b = kMomentum == Momentum::none ? unused : buffer[i];
      sgd_update<kMomentum, kFused>(param[i], grad[i], b, h);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      T g = grad[i];
      T& b = kMomentum == Momentum::none ? unused : buffer[i];
      sgd_update<kMomentum, kFused>(param[i], g, b, h);
    }
  }
}

// 16-bit tensors go through small fp32 blocks that stay in the L1 cache, rounded once at the end.
// B is the buffer's type: the parameter's, or float.
template <Momentum kMomentum, typename T, typename B>
void update_run16(T* param, T* grad, B* buffer, int64_t n, const SgdHyper<float>& hyper,
                  bool store_grad) {
  constexpr int64_t kBlock = 512;
  constexpr bool kWide = std::is_same_v<B, float>;
  alignas(64) float p[kBlock], g[kBlock], room[kWide ? 1 : kBlock];
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t size = n - at < kBlock ? n - at : kBlock;
    float* b = room;
    if constexpr (kWide) b = buffer + at;
    to_float(param + at, p, size);
    to_float(grad + at, g, size);
    if constexpr (!kWide && kMomentum == Momentum::running) to_float(buffer + at, b, size);
    update_run<kMomentum>(p, g, b, size, hyper, store_grad);
    from_float(p, param + at, size);
    if (store_grad) from_float(g, grad + at, size);
    if constexpr (!kWide && kMomentum != Momentum::none) from_float(b, buffer + at, size);
  }
}

template <Momentum kMomentum, typename T>
void update_elements16(const Elements& e, const GroupHyper& group) {
  auto* param = static_cast<T*>(e.param);
  auto* grad = static_cast<T*>(e.grad);
  if (e.wide_buffer) {
    return update_run16<kMomentum>(param, grad, static_cast<float*>(e.buffer), e.size, group.single,
                                   group.store_grad);
  }
  return update_run16<kMomentum>(param, grad, static_cast<T*>(e.buffer), e.size, group.single,
                                 group.store_grad);
}

template <Momentum kMomentum>
void update_elements(const Elements& e, const GroupHyper& group) {
  switch (e.dtype) {
    case ScalarType::Float:
      return update_run<kMomentum>(static_cast<float*>(e.param), static_cast<float*>(e.grad),
                                   static_cast<float*>(e.buffer), e.size, group.single,
                                   group.store_grad);
    case ScalarType::Double:
      return update_run<kMomentum>(static_cast<double*>(e.param), static_cast<double*>(e.grad),
                                   static_cast<double*>(e.buffer), e.size, group.twice,
                                   group.store_grad);
    case ScalarType::Half:
      return update_elements16<kMomentum, c10::Half>(e, group);
    default:
      return update_elements16<kMomentum, c10::BFloat16>(e, group);
  }
}

inline void update(const Elements& e, const GroupHyper& group) {
  switch (e.momentum) {
    case Momentum::none:
      return update_elements<Momentum::none>(e, group);
    case Momentum::first:
      return update_elements<Momentum::first>(e, group);
    case Momentum::running:
      return update_elements<Momentum::running>(e, group);
  }
}
