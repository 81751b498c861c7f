"""The Triton form of csrc/cuda/fused_adam.cuh: the same tables, one program to a run."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfreeze.kernels.rules import ADAM
from fastfreeze.kernels.step_triton import (
    arrive,
    finish_step,
    group_rate,
    load_run,
    run_of,
    store_run,
)

_BETA1 = tl.constexpr(ADAM.hypers.index("beta1"))
_BETA2 = tl.constexpr(ADAM.hypers.index("beta2"))
_EPS = tl.constexpr(ADAM.hypers.index("eps"))
_WEIGHT_DECAY = tl.constexpr(ADAM.hypers.index("weight_decay"))
_DECOUPLED = tl.constexpr(ADAM.hypers.index("decoupled"))
_MAXIMIZE = tl.constexpr(ADAM.hypers.index("maximize"))
_HYPERS = tl.constexpr(len(ADAM.hypers))


@triton.jit
def _load(
    param, grad, mean, square, largest, size, PARAM: tl.constexpr, STATE: tl.constexpr,
    MATH: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Parameters, gradients and moments, the last of no meaning without amsgrad."""
    p = load_run(param, size, PARAM, MATH, RUN, FULL)
    g = load_run(grad, size, PARAM, MATH, RUN, FULL)
    m = load_run(mean, size, STATE, MATH, RUN, FULL)
    v = load_run(square, size, STATE, MATH, RUN, FULL)
    most = v
    if largest != 0:
        most = load_run(largest, size, STATE, MATH, RUN, FULL)
    return p, g, m, v, most


@triton.jit
def _store(
    param, grad, mean, square, largest, size, p, g, m, v, most, PARAM: tl.constexpr,
    STATE: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    store_run(param, size, p, PARAM, RUN, FULL)
    if SCALED:
        store_run(grad, size, g, PARAM, RUN, FULL)
    store_run(mean, size, m, STATE, RUN, FULL)
    store_run(square, size, v, STATE, RUN, FULL)
    if largest != 0:
        store_run(largest, size, most, STATE, RUN, FULL)


@triton.jit
def _power(beta, k):
    """beta to a whole k >= 0, by squaring."""
    result = tl.full((), 1.0, tl.float64)
    while k > 0:
        result = tl.where((k & 1) != 0, result * beta, result)
        beta = beta * beta
        k = k >> 1
    return result


@triton.jit
def _adam_update(p, g, m, v, most, row, lr, k, amsgrad, live, MATH: tl.constexpr):
    """The new parameter and moments: ``adam_update`` of csrc/adam_math.h."""
    beta1 = tl.load(row + _BETA1, mask=live, other=0.0)
    beta2 = tl.load(row + _BETA2, mask=live, other=0.0)
    weight_decay = tl.load(row + _WEIGHT_DECAY, mask=live, other=0.0)
    decoupled = tl.load(row + _DECOUPLED, mask=live, other=0.0) != 0
    maximize = tl.load(row + _MAXIMIZE, mask=live, other=0.0) != 0
    root = tl.sqrt(1.0 - _power(beta2, k))
    step_size = (lr * root / (1.0 - _power(beta1, k))).to(MATH)
    eps = (tl.load(row + _EPS, mask=live, other=0.0) * root).to(MATH)
    decay = tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(MATH)
    added = tl.where(decoupled, 0.0, weight_decay).to(MATH)
    from_grad = 1.0 - beta1 >= 0.5  # to be exact for a small beta1
    mean_share = tl.where(from_grad, -beta1, 1.0 - beta1).to(MATH)
    d = tl.where(maximize, -g, g)
    d = tl.where(added != 0, tl.fma(p, added, d), d)
    m = tl.fma(d - m, mean_share, tl.where(from_grad, d, m))
    v = tl.fma(d * (1.0 - beta2).to(MATH), d, v * beta2.to(MATH))
    most = tl.where(amsgrad, tl.maximum(most, v, propagate_nan=tl.PropagateNan.ALL), v)
    if MATH.primitive_bitwidth == 64:
        change = step_size * m / (tl.sqrt(most) + eps)
    else:
        change = tl.div_rn(step_size * m, tl.sqrt_rn(most) + eps)
    return tl.fma(p, decay, -change), m, v, most


@triton.jit(do_not_specialize=["eta_min", "warmup_steps", "num_runs", "num_tensors", "track"])
def step_kernel(
    runs, grads, hypers, segments, begin, tensor_groups, progress, counters, grad_scale,
    found_inf, eta_min: tl.float64, warmup_steps: tl.float64, num_runs, num_tensors, track,
    PARAM: tl.constexpr, STATE: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr,
    SCALED: tl.constexpr, CHECKED: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    step = tl.load(counters)
    skip = 0
    if CHECKED:
        skip = (tl.load(found_inf) != 0).to(tl.int32)
    run = tl.program_id(0).to(tl.int64)
    live = (run < num_runs) & (skip == 0)
    mean = tl.load(runs + run * 6 + 1, mask=live, other=0)
    square = tl.load(runs + run * 6 + 2, mask=live, other=0)
    largest = tl.load(runs + run * 6 + 3, mask=live, other=0)
    tensor, group, size, param, grad, live = run_of(runs, grads, run, live, 3, PARAM, RUN)
    full = (size == RUN) & ((param | grad | mean | square | largest) % 16 == 0)
    # Elements, hyperparameters and schedule are on their way together.
    if full:
        p, g, m, v, most = _load(
            param, grad, mean, square, largest, size, PARAM, STATE, MATH, RUN, True
        )
    else:
        p, g, m, v, most = _load(
            param, grad, mean, square, largest, size, PARAM, STATE, MATH, RUN, False
        )
    steps = tl.load(progress + tensor, mask=live, other=0.0)
    row = hypers + group * _HYPERS
    lr, frozen = group_rate(
        row, segments, begin, group, eta_min, warmup_steps, step.to(tl.float64), live, _HYPERS
    )
    before = arrive(counters)
    if SCALED:
        g = g * (1.0 / tl.load(grad_scale).to(tl.float64)).to(MATH)
    first = steps == 0  # the moments are 0, whatever is in their memory
    m, v, most = tl.where(first, 0.0, m), tl.where(first, 0.0, v), tl.where(first, 0.0, most)
    k = steps.to(tl.int32) + 1
    p, m, v, most = _adam_update(p, g, m, v, most, row, lr, k, largest != 0, live, MATH)
    if full & (frozen == 0):
        _store(
            param, grad, mean, square, largest, size, p, g, m, v, most, PARAM, STATE, RUN, True,
            SCALED,
        )  # fmt: skip
    elif frozen == 0:
        _store(
            param, grad, mean, square, largest, size, p, g, m, v, most, PARAM, STATE, RUN, False,
            SCALED,
        )  # fmt: skip
    if before == tl.num_programs(0) - 1:
        finish_step(
            grads, segments, begin, tensor_groups, progress, counters, num_tensors, step, skip,
            track, True, TENSORS,
        )  # fmt: skip
