"""The Triton form of csrc/cuda/step.cuh and its rules: the same tables, one program to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from fastfreeze.kernels.library import current
from fastfreeze.kernels.rules import ADAM, SGD

if TYPE_CHECKING:
    from torch import Tensor

    from fastfreeze.kernels.device_plan import DevicePlan

DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_TENSORS = 128  # whose progress is looked at together
_THREADS = 256  # 8 elements a thread, 4 of fp64: with twice as many, some targets spill
_MOMENTUM = tl.constexpr(SGD.hypers.index("momentum"))
_DAMPENING = tl.constexpr(SGD.hypers.index("dampening"))
_SGD_WEIGHT_DECAY = tl.constexpr(SGD.hypers.index("weight_decay"))
_NESTEROV = tl.constexpr(SGD.hypers.index("nesterov"))
_SGD_MAXIMIZE = tl.constexpr(SGD.hypers.index("maximize"))
_BETA1 = tl.constexpr(ADAM.hypers.index("beta1"))
_BETA2 = tl.constexpr(ADAM.hypers.index("beta2"))
_EPS = tl.constexpr(ADAM.hypers.index("eps"))
_ADAM_WEIGHT_DECAY = tl.constexpr(ADAM.hypers.index("weight_decay"))
_DECOUPLED = tl.constexpr(ADAM.hypers.index("decoupled"))
_ADAM_MAXIMIZE = tl.constexpr(ADAM.hypers.index("maximize"))
warp_size = 64 if torch.version.hip else 32


def launch(
    plan: DevicePlan, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool
) -> None:
    """Launch a step of the plan, whose ``grad_table`` is up to date."""
    with current(plan.device):
        step_kernel[(max(1, len(plan.runs)),)](
            plan.runs,
            plan.grad_table,
            plan.hypers,
            plan.segments,
            plan.segment_begin,
            plan.tensor_groups,
            plan.progress,
            plan.counters,
            plan.counters if grad_scale is None else grad_scale,
            plan.counters if found_inf is None else found_inf,
            plan.eta_min,
            float(plan.warmup_steps),
            len(plan.runs),
            len(plan.progress),
            int(track),  # older interpreters take no bool
            ADAM=plan.rule is ADAM,
            HYPERS=len(plan.rule.hypers),
            PARAM=DTYPES[plan.param_dtype],
            STATE=DTYPES[plan.state_dtype],
            MATH=tl.float64 if plan.param_dtype == torch.float64 else tl.float32,
            RUN=plan.run_elements,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            TENSORS=_TENSORS,
            num_warps=_THREADS * (2 if plan.param_dtype == torch.float64 else 1) // warp_size,
        )


@triton.jit
def _run_of(runs, grads, run, live, MOMENTS: tl.constexpr, PARAM: tl.constexpr, RUN: tl.constexpr):
    """A row of the table of runs, with the gradient's address, and whether there is a gradient.

    Run's four int32 are two int64 here.
    """
    row = runs + run * (MOMENTS + 3)
    param = tl.load(row, mask=live, other=0)
    which = tl.load(row + MOMENTS + 1, mask=live, other=0)
    where = tl.load(row + MOMENTS + 2, mask=live, other=0)
    tensor, index = which & 0xFFFFFFFF, which >> 32
    grad = tl.load(grads + tensor, mask=live, other=0)
    live = live & (grad != 0)
    size = tl.where(live, where >> 32, 0)
    grad += index * RUN * (PARAM.primitive_bitwidth // 8)
    return tensor, where & 0xFFFFFFFF, size, param, grad, live


@triton.jit
def _load_run(
    address, size, DTYPE: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr
):
    """A run's elements of one tensor, in the precision of the arithmetic."""
    pointer, offsets, mask = address.to(tl.pointer_type(DTYPE)), tl.arange(0, RUN), None
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    else:
        mask = offsets < size
    # To fp32 at once: Triton's interpreter calculates with 16-bit patterns as if with integers.
    return tl.load(pointer + offsets, mask=mask).to(MATH)


@triton.jit
def _store_run(address, size, values, DTYPE: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr):
    """Rounded to the tensor's dtype."""
    pointer, offsets, mask = address.to(tl.pointer_type(DTYPE)), tl.arange(0, RUN), None
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    else:
        mask = offsets < size
    tl.store(pointer + offsets, values.to(DTYPE), mask=mask)


@triton.jit
def _load(
    param, grad, a, b, c, size, ADAM: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr,
    MATH: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Parameters, gradients and states, of no meaning where there are none."""
    p = _load_run(param, size, PARAM, MATH, RUN, FULL)
    g = _load_run(grad, size, PARAM, MATH, RUN, FULL)
    if ADAM:
        x = _load_run(a, size, STATE, MATH, RUN, FULL)
        y = _load_run(b, size, STATE, MATH, RUN, FULL)
        z = y
        if c != 0:
            z = _load_run(c, size, STATE, MATH, RUN, FULL)
    else:
        x = p
        if a != 0:
            x = _load_run(a, size, STATE, MATH, RUN, FULL)
        y, z = x, x
    return p, g, x, y, z


@triton.jit
def _store(
    param, grad, a, b, c, size, p, g, x, y, z, ADAM: tl.constexpr, PARAM: tl.constexpr,
    STATE: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    _store_run(param, size, p, PARAM, RUN, FULL)
    if SCALED:
        _store_run(grad, size, g, PARAM, RUN, FULL)
    if ADAM:
        _store_run(a, size, x, STATE, RUN, FULL)
        _store_run(b, size, y, STATE, RUN, FULL)
        if c != 0:
            _store_run(c, size, z, STATE, RUN, FULL)
    elif a != 0:
        _store_run(a, size, x, STATE, RUN, FULL)


@triton.jit
def _sgd_update(p, g, b, row, lr, buffered, started, live, MATH: tl.constexpr):
    """The new parameter and buffer: ``sgd_update`` of csrc/sgd_math.h."""
    maximize = tl.load(row + _SGD_MAXIMIZE, mask=live, other=0.0) != 0
    momentum = tl.load(row + _MOMENTUM, mask=live, other=0.0).to(MATH)
    share = (1.0 - tl.load(row + _DAMPENING, mask=live, other=0.0)).to(MATH)
    weight_decay = tl.load(row + _SGD_WEIGHT_DECAY, mask=live, other=0.0).to(MATH)
    nesterov = tl.load(row + _NESTEROV, mask=live, other=0.0) != 0
    d = tl.where(maximize, -g, g)
    d = tl.where(weight_decay != 0, tl.fma(p, weight_decay, d), d)
    b = tl.where(started, tl.fma(d, share, b * momentum), d)
    direction = tl.where(nesterov, tl.fma(b, momentum, d), b)
    direction = tl.where(buffered, direction, d)
    return tl.fma(direction, -lr.to(MATH), p), b


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
    weight_decay = tl.load(row + _ADAM_WEIGHT_DECAY, mask=live, other=0.0)
    decoupled = tl.load(row + _DECOUPLED, mask=live, other=0.0) != 0
    maximize = tl.load(row + _ADAM_MAXIMIZE, mask=live, other=0.0) != 0
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


@triton.jit
def _cos_pi(x):
    """cos(pi x) for x in 0..1, as the sine's series about 1/2; tl.cos would need local memory."""
    y = 3.141592653589793 * (0.5 - x)
    square = y * y
    sine = tl.full(y.shape, 1.0, tl.float64)
    for i in tl.static_range(11):
        sine = 1.0 - square * (1.0 / ((22 - 2 * i) * (23 - 2 * i))) * sine
    return y * sine


@triton.jit
def _segment_at(segments, row, end, most, at):
    """Start, length and scale of what holds a step: ``segment_at`` of csrc/schedule_math.h.

    The segments are row to end - 1, most of them at most; without any the length is infinite.
    """
    start = tl.load(segments + row * 3, mask=row < end, other=0.0)
    length = tl.load(segments + row * 3 + 1, mask=row < end, other=float("inf"))
    scale = tl.load(segments + row * 3 + 2, mask=row < end, other=1.0)
    for k in range(1, most):
        inside = row + k < end
        later = tl.load(segments + (row + k) * 3, mask=inside, other=float("inf"))
        begun = later <= at
        start = tl.where(begun, later, start)
        length = tl.where(
            begun, tl.load(segments + (row + k) * 3 + 1, mask=inside, other=1.0), length
        )
        scale = tl.where(
            begun, tl.load(segments + (row + k) * 3 + 2, mask=inside, other=1.0), scale
        )
    return start, length, scale


@triton.jit
def _group_rate(
    row_of_hypers, segments, begin, group, eta_min, warmup_steps, at, live, HYPERS: tl.constexpr
):
    """Learning rate and whether frozen: ``group_rate`` of csrc/schedule_math.h.

    A group's hyperparameters begin with lr and end with initial_lr.
    """
    lr = tl.load(row_of_hypers, mask=live, other=0.0)
    initial_lr = tl.load(row_of_hypers + HYPERS - 1, mask=live, other=0.0)
    row = tl.load(begin + group, mask=live, other=0)
    end = tl.load(begin + group + 1, mask=live, other=0)
    start, length, scale = _segment_at(segments, row, end, end - row, at)
    frozen = length == 0
    phase = (at - start) / tl.where(frozen, 1.0, length)
    phase = tl.where(phase < 1.0, phase, 1.0)
    factor = 0.5 * (1.0 + _cos_pi(phase))
    scheduled = eta_min + (scale * initial_lr - eta_min) * factor
    warm = at + 1.0 < warmup_steps
    scheduled *= tl.where(warm, (at + 1.0) / tl.where(warm, warmup_steps, 1.0), 1.0)
    return tl.where(row < end, scheduled, lr), frozen


@triton.jit
def _arrive(counters):
    """How many programs have before. A program does before it stores, and waits for no store."""
    tl.debug_barrier()
    return tl.atomic_add(counters + 1, 1)


@triton.jit
def _finish_step(
    grads, segments, begin, tensor_groups, progress, counters, num_tensors, step, skip, track,
    ADAM: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """What the program does that arrived last, when all others have read what it writes.

    Adam's ``progress`` counts steps; SGD's is 1 after the first.
    """
    if track:  # no constant: a captured step would compile a kernel of its own in the capture
        at = step.to(tl.float64)
        for first in range(0, num_tensors, TENSORS):
            tensor = first + tl.arange(0, TENSORS)
            mask = tensor < num_tensors
            steps = tl.load(grads + tensor, mask=mask, other=0) != 0
            before = tl.load(progress + tensor, mask=mask, other=0)
            group = tl.load(tensor_groups + tensor, mask=mask, other=0)
            row = tl.load(begin + group, mask=mask, other=0)
            end = tl.load(begin + group + 1, mask=mask, other=0)
            _, length, _ = _segment_at(segments, row, end, tl.max(end - row), at)
            steps = steps & (skip == 0)
            if ADAM:
                after = tl.where(steps, before + 1.0, before)
            else:
                after = ((before != 0) | steps).to(tl.uint8)
            # A frozen layer has no state: should it thaw, its tensors start anew.
            tl.store(progress + tensor, tl.where(length != 0, after, 0).to(before.dtype), mask=mask)
    tl.store(counters, step + 1)
    tl.store(counters + 1, 0)


@triton.jit(do_not_specialize=["eta_min", "warmup_steps", "num_runs", "num_tensors", "track"])
def step_kernel(
    runs, grads, hypers, segments, begin, tensor_groups, progress, counters, grad_scale,
    found_inf, eta_min: tl.float64, warmup_steps: tl.float64, num_runs, num_tensors, track,
    ADAM: tl.constexpr, HYPERS: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr,
    MATH: tl.constexpr, RUN: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
    TENSORS: tl.constexpr,
):  # fmt: skip
    """States a, b and c: SGD's buffer, if there is one; Adam's moments, c with amsgrad alone."""
    STATES: tl.constexpr = 3 if ADAM else 1
    step = tl.load(counters)
    skip = 0
    if CHECKED:
        skip = (tl.load(found_inf) != 0).to(tl.int32)
    run = tl.program_id(0).to(tl.int64)
    live = (run < num_runs) & (skip == 0)
    a = tl.load(runs + run * (STATES + 3) + 1, mask=live, other=0)
    b, c = a, a
    if ADAM:
        b = tl.load(runs + run * (STATES + 3) + 2, mask=live, other=0)
        c = tl.load(runs + run * (STATES + 3) + 3, mask=live, other=0)
    tensor, group, size, param, grad, live = _run_of(runs, grads, run, live, STATES, PARAM, RUN)
    full = (size == RUN) & ((param | grad | a | b | c) % 16 == 0)
    # Elements, hyperparameters and schedule are on their way together.
    if full:
        p, g, x, y, z = _load(param, grad, a, b, c, size, ADAM, PARAM, STATE, MATH, RUN, True)
    else:
        p, g, x, y, z = _load(param, grad, a, b, c, size, ADAM, PARAM, STATE, MATH, RUN, False)
    steps = tl.load(progress + tensor, mask=live, other=0)
    row = hypers + group * HYPERS
    lr, frozen = _group_rate(
        row, segments, begin, group, eta_min, warmup_steps, step.to(tl.float64), live, HYPERS
    )
    before = _arrive(counters)
    if SCALED:
        g = g * (1.0 / tl.load(grad_scale).to(tl.float64)).to(MATH)
    if ADAM:
        first = steps == 0  # the moments are 0, whatever is in their memory
        x, y, z = tl.where(first, 0.0, x), tl.where(first, 0.0, y), tl.where(first, 0.0, z)
        k = steps.to(tl.int32) + 1
        p, x, y, z = _adam_update(p, g, x, y, z, row, lr, k, c != 0, live, MATH)
    else:
        p, x = _sgd_update(p, g, x, row, lr, a != 0, steps != 0, live, MATH)
    if full & (frozen == 0):
        _store(param, grad, a, b, c, size, p, g, x, y, z, ADAM, PARAM, STATE, RUN, True, SCALED)
    elif frozen == 0:
        _store(param, grad, a, b, c, size, p, g, x, y, z, ADAM, PARAM, STATE, RUN, False, SCALED)
    if before == tl.num_programs(0) - 1:
        _finish_step(
            grads, segments, begin, tensor_groups, progress, counters, num_tensors, step, skip,
            track, ADAM, TENSORS,
        )  # fmt: skip
