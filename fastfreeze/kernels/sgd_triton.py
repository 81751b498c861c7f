"""The Triton form of csrc/cuda/fused_sgd.cuh: the same tables, one program to a run."""

from __future__ import annotations

import triton
import triton.language as tl

from fastfreeze.kernels.rules import SGD
from fastfreeze.kernels.step_triton import (
    arrive,
    finish_step,
    group_rate,
    load_run,
    run_of,
    store_run,
)

_MOMENTUM = tl.constexpr(SGD.hypers.index("momentum"))
_DAMPENING = tl.constexpr(SGD.hypers.index("dampening"))
_WEIGHT_DECAY = tl.constexpr(SGD.hypers.index("weight_decay"))
_NESTEROV = tl.constexpr(SGD.hypers.index("nesterov"))
_MAXIMIZE = tl.constexpr(SGD.hypers.index("maximize"))
_HYPERS = tl.constexpr(len(SGD.hypers))


@triton.jit
def _load(
    param, grad, buffer, size, PARAM: tl.constexpr, STATE: tl.constexpr, MATH: tl.constexpr,
    RUN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Parameters, gradients and momentum, of no meaning without a buffer."""
    p = load_run(param, size, PARAM, MATH, RUN, FULL)
    g = load_run(grad, size, PARAM, MATH, RUN, FULL)
    b = p
    if buffer != 0:
        b = load_run(buffer, size, STATE, MATH, RUN, FULL)
    return p, g, b


@triton.jit
def _store(
    param, grad, buffer, size, p, g, b, PARAM: tl.constexpr, STATE: tl.constexpr,
    RUN: tl.constexpr, FULL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    store_run(param, size, p, PARAM, RUN, FULL)
    if SCALED:
        store_run(grad, size, g, PARAM, RUN, FULL)
    if buffer != 0:
        store_run(buffer, size, b, STATE, RUN, FULL)


@triton.jit
def _sgd_update(p, g, b, row, lr, buffered, started, live, MATH: tl.constexpr):
    """The new parameter and buffer: ``sgd_update`` of csrc/sgd_math.h."""
    maximize = tl.load(row + _MAXIMIZE, mask=live, other=0.0) != 0
    momentum = tl.load(row + _MOMENTUM, mask=live, other=0.0).to(MATH)
    share = (1.0 - tl.load(row + _DAMPENING, mask=live, other=0.0)).to(MATH)
    weight_decay = tl.load(row + _WEIGHT_DECAY, mask=live, other=0.0).to(MATH)
    nesterov = tl.load(row + _NESTEROV, mask=live, other=0.0) != 0
    d = tl.where(maximize, -g, g)
    d = tl.where(weight_decay != 0, tl.fma(p, weight_decay, d), d)
    b = tl.where(started, tl.fma(d, share, b * momentum), d)
    direction = tl.where(nesterov, tl.fma(b, momentum, d), b)
    direction = tl.where(buffered, direction, d)
    return tl.fma(direction, -lr.to(MATH), p), b


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
    buffer = tl.load(runs + run * 4 + 1, mask=live, other=0)
    tensor, group, size, param, grad, live = run_of(runs, grads, run, live, 1, PARAM, RUN)
    full = (size == RUN) & ((param | grad | buffer) % 16 == 0)
    # Elements, hyperparameters and schedule are on their way together.
    if full:
        p, g, b = _load(param, grad, buffer, size, PARAM, STATE, MATH, RUN, True)
    else:
        p, g, b = _load(param, grad, buffer, size, PARAM, STATE, MATH, RUN, False)
    started = tl.load(progress + tensor, mask=live, other=0) != 0
    row = hypers + group * _HYPERS
    lr, frozen = group_rate(
        row, segments, begin, group, eta_min, warmup_steps, step.to(tl.float64), live, _HYPERS
    )
    before = arrive(counters)
    if SCALED:
        g = g * (1.0 / tl.load(grad_scale).to(tl.float64)).to(MATH)
    p, b = _sgd_update(p, g, b, row, lr, buffer != 0, started, live, MATH)
    if full & (frozen == 0):
        _store(param, grad, buffer, size, p, g, b, PARAM, STATE, RUN, True, SCALED)
    elif frozen == 0:
        _store(param, grad, buffer, size, p, g, b, PARAM, STATE, RUN, False, SCALED)
    if before == tl.num_programs(0) - 1:
        finish_step(
            grads, segments, begin, tensor_groups, progress, counters, num_tensors, step, skip,
            track, False, TENSORS,
        )  # fmt: skip
