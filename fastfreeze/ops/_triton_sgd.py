"""The Triton form of csrc/cuda/fused_sgd.cuh: the same tables, one program to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfreeze.ops._library import current

if TYPE_CHECKING:
    from fastfreeze.ops._device_sgd import TritonPlan

_DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_TENSORS = 128  # that have started or not, looked at together
_THREADS = 256  # 8 elements a thread, 4 of fp64: with twice as many, some targets spill
warp_size = 64 if torch.version.hip else 32

# Columns of the tables, as in csrc/sgd_tables.h and SgdRun.
_LR = tl.constexpr(0)
_MOMENTUM = tl.constexpr(1)
_DAMPENING = tl.constexpr(2)
_WEIGHT_DECAY = tl.constexpr(3)
_NESTEROV = tl.constexpr(4)
_MAXIMIZE = tl.constexpr(5)
_INITIAL_LR = tl.constexpr(6)
_HYPERS = tl.constexpr(7)


def step(
    plan: TritonPlan, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool
) -> None:
    """Launch a step of the plan, whose ``grad_table`` is up to date."""
    with current(plan.device):
        _step_kernel[(max(1, len(plan.runs)),)](
            plan.runs,
            plan.grad_table,
            plan.hypers,
            plan.segments,
            plan.segment_begin,
            plan.tensor_groups,
            plan.started,
            plan.counters,
            plan.counters if grad_scale is None else grad_scale,
            plan.counters if found_inf is None else found_inf,
            plan.eta_min,
            float(plan.warmup_steps),
            len(plan.runs),
            len(plan.started),
            int(track),  # older interpreters take no bool
            PARAM=_DTYPES[plan.param_dtype],
            BUFFER=_DTYPES[plan.buffer_dtype],
            MATH=tl.float64 if plan.param_dtype == torch.float64 else tl.float32,
            RUN=plan.run_elements,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            TENSORS=_TENSORS,
            num_warps=_THREADS * (2 if plan.param_dtype == torch.float64 else 1) // warp_size,
        )


@triton.jit
def _load_run(
    param, grad, buffer, size, PARAM: tl.constexpr, BUFFER: tl.constexpr, MATH: tl.constexpr,
    RUN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Parameters, gradients and momentum, of no meaning without a buffer."""
    param, grad = param.to(tl.pointer_type(PARAM)), grad.to(tl.pointer_type(PARAM))
    offsets = tl.arange(0, RUN)
    mask = None
    if FULL:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
    else:
        mask = offsets < size
    # To fp32 at once: Triton's interpreter calculates with 16-bit patterns as if with integers.
    p = tl.load(param + offsets, mask=mask).to(MATH)
    g = tl.load(grad + offsets, mask=mask).to(MATH)
    b = p
    if buffer != 0:
        momentum = buffer.to(tl.pointer_type(BUFFER))
        if FULL:
            momentum = tl.multiple_of(momentum, 16)
        b = tl.load(momentum + offsets, mask=mask).to(MATH)
    return p, g, b


@triton.jit
def _store_run(
    param, grad, buffer, size, p, g, b, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    RUN: tl.constexpr, FULL: tl.constexpr, STORE_GRAD: tl.constexpr,
):  # fmt: skip
    param, grad = param.to(tl.pointer_type(PARAM)), grad.to(tl.pointer_type(PARAM))
    offsets = tl.arange(0, RUN)
    mask = None
    if FULL:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
    else:
        mask = offsets < size
    tl.store(param + offsets, p.to(PARAM), mask=mask)
    if STORE_GRAD:
        tl.store(grad + offsets, g.to(PARAM), mask=mask)
    if buffer != 0:
        momentum = buffer.to(tl.pointer_type(BUFFER))
        if FULL:
            momentum = tl.multiple_of(momentum, 16)
        tl.store(momentum + offsets, b.to(BUFFER), mask=mask)


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
def _group_rate(hypers, segments, begin, group, eta_min, warmup_steps, at, live):
    """Learning rate and whether frozen: ``group_rate`` of csrc/sgd_tables.h."""
    lr = tl.load(hypers + group * _HYPERS + _LR, mask=live, other=0.0)
    initial_lr = tl.load(hypers + group * _HYPERS + _INITIAL_LR, mask=live, other=0.0)
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
def _track_started(
    grads, segments, begin, tensor_groups, started, num_tensors, at, skip, TENSORS: tl.constexpr
):
    """A frozen layer has no momentum: should it thaw, its buffers start anew."""
    for first in range(0, num_tensors, TENSORS):
        tensor = first + tl.arange(0, TENSORS)
        mask = tensor < num_tensors
        had_grad = tl.load(grads + tensor, mask=mask, other=0) != 0
        before = tl.load(started + tensor, mask=mask, other=0) != 0
        group = tl.load(tensor_groups + tensor, mask=mask, other=0)
        row = tl.load(begin + group, mask=mask, other=0)
        end = tl.load(begin + group + 1, mask=mask, other=0)
        _, length, _ = _segment_at(segments, row, end, tl.max(end - row), at)
        after = (before | (had_grad & (skip == 0))) & (length != 0)
        tl.store(started + tensor, after.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["eta_min", "warmup_steps", "num_runs", "num_tensors", "track"])
def _step_kernel(
    runs, grads, hypers, segments, begin, tensor_groups, started, counters, grad_scale,
    found_inf, eta_min: tl.float64, warmup_steps: tl.float64, num_runs, num_tensors, track,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr,
    SCALED: tl.constexpr, CHECKED: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    step = tl.load(counters)
    at = step.to(tl.float64)
    skip = 0
    if CHECKED:
        skip = (tl.load(found_inf) != 0).to(tl.int32)
    run = tl.program_id(0).to(tl.int64)
    live = (run < num_runs) & (skip == 0)
    param = tl.load(runs + run * 4, mask=live, other=0)
    buffer = tl.load(runs + run * 4 + 1, mask=live, other=0)
    which = tl.load(runs + run * 4 + 2, mask=live, other=0)  # SgdRun's four int32, two at a time
    where = tl.load(runs + run * 4 + 3, mask=live, other=0)
    tensor, index = which & 0xFFFFFFFF, which >> 32
    group = where & 0xFFFFFFFF
    grad = tl.load(grads + tensor, mask=live, other=0)
    live = live & (grad != 0)
    size = tl.where(live, where >> 32, 0)
    grad += index * RUN * (PARAM.primitive_bitwidth // 8)
    full = (size == RUN) & ((param | grad | buffer) % 16 == 0)
    # Elements, hyperparameters and schedule are on their way together.
    if full:
        p, g, b = _load_run(param, grad, buffer, size, PARAM, BUFFER, MATH, RUN, True)
    else:
        p, g, b = _load_run(param, grad, buffer, size, PARAM, BUFFER, MATH, RUN, False)
    has_started = tl.load(started + tensor, mask=live, other=0) != 0
    lr, frozen = _group_rate(hypers, segments, begin, group, eta_min, warmup_steps, at, live)
    # A program arrives before it stores anything: it need not wait for stores.
    tl.debug_barrier()
    before = tl.atomic_add(counters + 1, 1)
    if SCALED:
        inverse = 1.0 / tl.load(grad_scale).to(tl.float64)
        g = g * inverse.to(MATH)
    p, b = _sgd_update(p, g, b, hypers + group * _HYPERS, lr, buffer != 0, has_started, live, MATH)
    if full & (frozen == 0):
        _store_run(param, grad, buffer, size, p, g, b, PARAM, BUFFER, RUN, True, SCALED)
    elif frozen == 0:
        _store_run(param, grad, buffer, size, p, g, b, PARAM, BUFFER, RUN, False, SCALED)
    # The program that arrived last, when all others have read what it writes.
    if before == tl.num_programs(0) - 1:
        if track:  # no constant: a captured step would compile a kernel of its own in the capture
            _track_started(
                grads, segments, begin, tensor_groups, started, num_tensors, at, skip, TENSORS
            )
        tl.store(counters, step + 1)
        tl.store(counters + 1, 0)
