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
_GROUPS = 128  # learning rates computed at a time
_THREADS = 256  # 8 elements a thread: with 16, sm_75 spills
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
# What the momentum buffer is at this step.
_NONE = tl.constexpr(0)
_FIRST = tl.constexpr(1)
_RUNNING = tl.constexpr(2)


def step(
    plan: TritonPlan, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool
) -> None:
    """Launch a step of the plan, whose ``grad_table`` is up to date."""
    with current(plan.device):
        _step_kernel[(max(1, len(plan.runs)),)](
            plan.runs,
            plan.grad_table,
            plan.hypers,
            plan.states,
            plan.segments,
            plan.segment_begin,
            plan.tensor_groups,
            plan.started,
            plan.counters,
            plan.counters if grad_scale is None else grad_scale,
            plan.counters if found_inf is None else found_inf,
            plan.eta_min,
            len(plan.runs),
            len(plan.started),
            len(plan.hypers),
            track,
            PARAM=_DTYPES[plan.param_dtype],
            BUFFER=_DTYPES[plan.buffer_dtype],
            MATH=tl.float64 if plan.param_dtype == torch.float64 else tl.float32,
            RUN=plan.run_elements,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            SCHEDULED=plan.scheduled,
            GROUPS=_GROUPS,
            num_warps=_THREADS // warp_size,
        )


def seek(plan: TritonPlan, step: int) -> None:
    """Bring the plan's tables to a step of the schedule."""
    with current(plan.device):
        _seek_kernel[(1,)](
            plan.hypers,
            plan.states,
            plan.segments,
            plan.segment_begin,
            plan.counters,
            plan.eta_min,
            len(plan.hypers),
            step,
            SCHEDULED=plan.scheduled,
            GROUPS=_GROUPS,
            num_warps=4,
        )


@triton.jit
def _sgd_update(p, g, b, lr, momentum, share, weight_decay, nesterov, KIND: tl.constexpr):
    """The new parameter and buffer: ``sgd_update`` of csrc/sgd_math.h."""
    d = tl.where(weight_decay != 0, tl.fma(p, weight_decay, g), g)
    if KIND == _FIRST:
        b = d
    if KIND == _RUNNING:
        b = tl.fma(d, share, b * momentum)
    if KIND != _NONE:
        d = tl.where(nesterov, tl.fma(b, momentum, d), b)
    return tl.fma(d, -lr, p), b


@triton.jit
def _update_run(
    param, grad, buffer, size, row, lr, inv_scale,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr,
    KIND: tl.constexpr, FULL: tl.constexpr, STORE_GRAD: tl.constexpr,
):  # fmt: skip
    """FULL: the run fills the block and every address is a multiple of 16."""
    # Pointers are made here: a hint given to a function's argument is lost when it is inlined.
    param, grad = param.to(tl.pointer_type(PARAM)), grad.to(tl.pointer_type(PARAM))
    buffer = buffer.to(tl.pointer_type(BUFFER))
    offsets = tl.arange(0, RUN)
    mask = None
    if FULL:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        buffer = tl.multiple_of(buffer, 16)
    else:
        mask = offsets < size
    # To fp32 at once: Triton's interpreter calculates with 16-bit patterns as if with integers.
    p = tl.load(param + offsets, mask=mask).to(MATH)
    g = tl.load(grad + offsets, mask=mask).to(MATH) * inv_scale.to(MATH)
    b = p
    if KIND == _RUNNING:
        b = tl.load(buffer + offsets, mask=mask).to(MATH)
    if STORE_GRAD:
        tl.store(grad + offsets, g.to(PARAM), mask=mask)
    g = tl.where(tl.load(row + _MAXIMIZE) != 0, -g, g)
    momentum = tl.load(row + _MOMENTUM).to(MATH)
    share = (1.0 - tl.load(row + _DAMPENING)).to(MATH)
    weight_decay = tl.load(row + _WEIGHT_DECAY).to(MATH)
    nesterov = tl.load(row + _NESTEROV) != 0
    p, b = _sgd_update(p, g, b, lr.to(MATH), momentum, share, weight_decay, nesterov, KIND)
    tl.store(param + offsets, p.to(PARAM), mask=mask)
    if KIND != _NONE:
        tl.store(buffer + offsets, b.to(BUFFER), mask=mask)


@triton.jit
def _update_kind(
    param, grad, buffer, size, row, lr, inv_scale,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr,
    KIND: tl.constexpr, STORE_GRAD: tl.constexpr,
):  # fmt: skip
    if (size == RUN) & ((param | grad | buffer) % 16 == 0):
        _update_run(
            param, grad, buffer, size, row, lr, inv_scale,
            PARAM, BUFFER, MATH, RUN, KIND, True, STORE_GRAD,
        )  # fmt: skip
    else:
        _update_run(
            param, grad, buffer, size, row, lr, inv_scale,
            PARAM, BUFFER, MATH, RUN, KIND, False, STORE_GRAD,
        )  # fmt: skip


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
def _set_states(hypers, states, segments, begin, eta_min, num_groups, step, GROUPS: tl.constexpr):
    """Each group's learning rate at ``step``: ``group_rate`` of csrc/sgd_tables.h."""
    at = step.to(tl.float64)
    for first in range(0, num_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        mask = group < num_groups
        row = tl.load(begin + group, mask=mask, other=0)
        end = tl.load(begin + group + 1, mask=mask, other=0)
        start = tl.load(segments + row * 3, mask=row < end, other=0.0)
        length = tl.load(segments + row * 3 + 1, mask=row < end, other=1.0)
        scale = tl.load(segments + row * 3 + 2, mask=row < end, other=1.0)
        for k in range(1, tl.max(end - row)):
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
        frozen = length == 0
        phase = (at - start) / tl.where(frozen, 1.0, length)
        phase = tl.where(phase < 1.0, phase, 1.0)
        factor = 0.5 * (1.0 + _cos_pi(phase))
        initial_lr = tl.load(hypers + group * _HYPERS + _INITIAL_LR, mask=mask, other=0.0)
        lr = eta_min + (scale * initial_lr - eta_min) * factor
        tl.store(states + group * 2, tl.where(frozen, 0.0, lr), mask=mask)
        tl.store(states + group * 2 + 1, frozen.to(tl.float64), mask=mask)


@triton.jit
def _track_started(
    grads, states, tensor_groups, started, num_tensors, skip,
    SCHEDULED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A frozen layer has no momentum: should it thaw, its buffers start anew."""
    for first in range(0, num_tensors, GROUPS):
        tensor = first + tl.arange(0, GROUPS)
        mask = tensor < num_tensors
        had_grad = tl.load(grads + tensor, mask=mask, other=0) != 0
        before = tl.load(started + tensor, mask=mask, other=0) != 0
        after = before | (had_grad & (skip == 0))
        if SCHEDULED:
            group = tl.load(tensor_groups + tensor, mask=mask, other=0)
            after = after & (tl.load(states + group * 2 + 1, mask=mask, other=0.0) == 0)
        tl.store(started + tensor, after.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["eta_min", "num_runs", "num_tensors", "num_groups", "track"])
def _step_kernel(
    runs, grads, hypers, states, segments, begin, tensor_groups, started, counters, grad_scale,
    found_inf, eta_min: tl.float64, num_runs, num_tensors, num_groups, track,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, MATH: tl.constexpr, RUN: tl.constexpr,
    SCALED: tl.constexpr, CHECKED: tl.constexpr, SCHEDULED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    skip = 0
    if CHECKED:
        skip = (tl.load(found_inf) != 0).to(tl.int32)
    if (run < num_runs) & (skip == 0):
        param = tl.load(runs + run * 4)
        buffer = tl.load(runs + run * 4 + 1)
        which = tl.load(runs + run * 4 + 2)  # SgdRun's four int32, two at a time
        where = tl.load(runs + run * 4 + 3)
        tensor, index = which & 0xFFFFFFFF, which >> 32
        group, size = where & 0xFFFFFFFF, where >> 32
        grad = tl.load(grads + tensor)
        row = hypers + group * _HYPERS
        frozen = grad == 0
        lr = tl.load(row + _LR)
        if SCHEDULED:
            lr = tl.load(states + group * 2)
            frozen = frozen | (tl.load(states + group * 2 + 1) != 0)
        if frozen == 0:
            inv_scale = lr * 0 + 1
            if SCALED:
                inv_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
            grad += index * RUN * (PARAM.primitive_bitwidth // 8)
            if buffer == 0:
                _update_kind(
                    param, grad, buffer, size, row, lr, inv_scale,
                    PARAM, BUFFER, MATH, RUN, _NONE, SCALED,
                )  # fmt: skip
            elif tl.load(started + tensor) == 0:
                _update_kind(
                    param, grad, buffer, size, row, lr, inv_scale,
                    PARAM, BUFFER, MATH, RUN, _FIRST, SCALED,
                )  # fmt: skip
            else:
                _update_kind(
                    param, grad, buffer, size, row, lr, inv_scale,
                    PARAM, BUFFER, MATH, RUN, _RUNNING, SCALED,
                )  # fmt: skip
    # The program that ends last, when all others have read what it writes, prepares the next step.
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1) == tl.num_programs(0) - 1:
        if track:  # no constant: a captured step would compile a kernel of its own in the capture
            _track_started(
                grads, states, tensor_groups, started, num_tensors, skip, SCHEDULED, GROUPS
            )
        tl.debug_barrier()
        following = tl.load(counters) + 1
        if SCHEDULED:
            _set_states(hypers, states, segments, begin, eta_min, num_groups, following, GROUPS)
        tl.debug_barrier()
        tl.store(counters, following)
        tl.store(counters + 1, 0)


@triton.jit(do_not_specialize=["eta_min", "num_groups", "step"])
def _seek_kernel(
    hypers, states, segments, begin, counters, eta_min: tl.float64, num_groups, step: tl.int64,
    SCHEDULED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    if SCHEDULED:
        _set_states(hypers, states, segments, begin, eta_min, num_groups, step, GROUPS)
    tl.store(counters, step)
