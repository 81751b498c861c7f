"""What the Triton forms of the kernels on csrc/cuda/step.cuh share: one program to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from fastfreeze.kernels.library import current

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
warp_size = 64 if torch.version.hip else 32


def launch(
    kernel: Any, plan: DevicePlan, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool
) -> None:
    """Launch a step of the plan, whose ``grad_table`` is up to date."""
    with current(plan.device):
        kernel[(max(1, len(plan.runs)),)](
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
def run_of(runs, grads, run, live, MOMENTS: tl.constexpr, PARAM: tl.constexpr, RUN: tl.constexpr):
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
def load_run(
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
def store_run(address, size, values, DTYPE: tl.constexpr, RUN: tl.constexpr, FULL: tl.constexpr):
    """Rounded to the tensor's dtype."""
    pointer, offsets, mask = address.to(tl.pointer_type(DTYPE)), tl.arange(0, RUN), None
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    else:
        mask = offsets < size
    tl.store(pointer + offsets, values.to(DTYPE), mask=mask)


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
def group_rate(
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
def arrive(counters):
    """How many programs have before. A program does before it stores, and waits for no store."""
    tl.debug_barrier()
    return tl.atomic_add(counters + 1, 1)


@triton.jit
def finish_step(
    grads, segments, begin, tensor_groups, progress, counters, num_tensors, step, skip, track,
    COUNTS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """What the program does that arrived last, when all others have read what it writes.

    COUNTS: ``progress`` counts steps; or else it is 1 after the first.
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
            if COUNTS:
                after = tl.where(steps, before + 1.0, before)
            else:
                after = ((before != 0) | steps).to(tl.uint8)
            # A frozen layer has no state: should it thaw, its tensors start anew.
            tl.store(progress + tensor, tl.where(length != 0, after, 0).to(before.dtype), mask=mask)
    tl.store(counters, step + 1)
    tl.store(counters + 1, 0)
