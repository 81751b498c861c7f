// The update of a run of elements, included once for each instruction set (isa.h).

#include "cpu/convert_loops.h"

// Kind: how many of the states a, b, c there are, and the update of one element.
template <typename Kind, typename T, typename Hyper>
void update_run(T* __restrict param, T* __restrict grad, T* __restrict a, T* __restrict b,
                T* __restrict c, int64_t n, const Hyper& hyper, bool store_grad) {
  Hyper h = hyper;  // a copy that no store below can alias
  if (store_grad) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= hyper.inv_grad_scale;
    h.inv_grad_scale = 1;
  }
  T unused = 0;
  for (int64_t i = 0; i < n; ++i) {
    T g = grad[i];
    Kind::template update<(FASTFREEZE_ISA_LEVEL > 0)>(
        param[i], g, Kind::kStates > 0 ? a[i] : unused, Kind::kStates > 1 ? b[i] : unused,
        Kind::kStates > 2 ? c[i] : unused, h);
  }
}

constexpr int64_t kBlock = 512;

// A block of a state in fp32: where it is, or a copy.
template <typename S>
struct WideBlock {
  alignas(64) float room[std::is_same_v<S, float> ? 1 : kBlock];

  float* read(S* memory, int64_t size) {
    if constexpr (std::is_same_v<S, float>) {
      return memory;
    } else {
      to_float(memory, room, size);
      return room;
    }
  }
  void write(S* memory, int64_t size) {
    if constexpr (!std::is_same_v<S, float>) from_float(room, memory, size);
  }
};

// 16-bit tensors go through small fp32 blocks that stay in the L1 cache, rounded once at the end.
// S is the states' type: the parameter's, or float.
template <typename Kind, typename S, typename T, typename Hyper>
void update_run16(const Elements& e, T* param, T* grad, const Hyper& hyper, bool store_grad) {
  alignas(64) float p[kBlock], g[kBlock];
  WideBlock<S> blocks[kMostStates];
  float* states[kMostStates] = {};
  for (int64_t at = 0; at < e.size; at += kBlock) {
    const int64_t size = std::min(kBlock, e.size - at);
    const auto state = [&](int s) { return static_cast<S*>(e.states[s]) + at; };
    to_float(param + at, p, size);
    to_float(grad + at, g, size);
    for (int s = 0; s < Kind::kStates; ++s) states[s] = blocks[s].read(state(s), size);
    update_run<Kind>(p, g, states[0], states[1], states[2], size, hyper, store_grad);
    from_float(p, param + at, size);
    if (store_grad) from_float(g, grad + at, size);
    for (int s = 0; s < Kind::kStates; ++s) blocks[s].write(state(s), size);
  }
}

template <typename Kind, typename T, typename Step>
void update_elements(const Elements& e, const Step& step) {
  auto *param = static_cast<T*>(e.param), *grad = static_cast<T*>(e.grad);
  if constexpr (sizeof(T) == 2) {
    if (e.wide_state)
      return update_run16<Kind, float>(e, param, grad, step.single, step.store_grad);
    update_run16<Kind, T>(e, param, grad, step.single, step.store_grad);
  } else {
    const auto state = [&](int s) { return static_cast<T*>(e.states[s]); };
    update_run<Kind>(param, grad, state(0), state(1), state(2), e.size, step.template of<T>(),
                     step.store_grad);
  }
}

template <typename Kind, typename Step>
void update_as(const Elements& e, const Step& step) {
  switch (e.dtype) {
    case ScalarType::Float:
      return update_elements<Kind, float>(e, step);
    case ScalarType::Double:
      return update_elements<Kind, double>(e, step);
    case ScalarType::Half:
      return update_elements<Kind, c10::Half>(e, step);
    default:
      return update_elements<Kind, c10::BFloat16>(e, step);
  }
}

template <typename Rule>
void update(const Elements& e, const TensorStep<Rule>& step) {
  Rule::with_kind(e, step.progress, [&](auto kind) { update_as<decltype(kind)>(e, step); });
}
