"""Fused SGD: the functional form, and the choice of a backend for each parameter."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastfreeze.ops import _library
from fastfreeze.ops._device_sgd import CudaPlan, TritonPlan
from fastfreeze.ops._library import Backend
from fastfreeze.ops._memory import sharing
from fastfreeze.ops._placements import PLAIN, Given, holds_values
from fastfreeze.ops._plans import (
    HYPERS,
    KERNEL_DTYPES,
    CpuPlan,
    PlanSpec,
    ReferencePlan,
    SgdPlan,
    buffer_dtype,
    same_strides,
)

PLANS: dict[Backend, type[SgdPlan]] = {
    "cuda": CudaPlan,
    "triton": TritonPlan,
    "cpu": CpuPlan,
    "reference": ReferencePlan,
}


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | None = None,
    momentum_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> None:
    """One SGD step in place, with ``torch.optim.SGD``'s arithmetic.

    Traced by ``torch.compile`` as one operator, ``fastfreeze::sgd_``.

    Args:
        params: tensors to update, of any shapes, strides and dtypes.
        grads: their gradients, of the same shapes and dtypes; None leaves a parameter as it is.
        momentum_buffers: one per parameter; None where a parameter has had no step yet, and
            replaced by a buffer if ``momentum`` is not 0. The first step copies the gradient into
            it, undampened.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        grad_scale: what the loss was multiplied by; the gradients are divided by it in place.
        momentum_dtype: torch.float32 keeps the buffers of float16 and bfloat16 parameters in
            float32, and rounds nothing but the parameter; None keeps them as their parameters.
        backend: what runs it; None chooses the fastest that can.

    Raises:
        ValueError: lists of different lengths, a gradient of another shape or dtype, or a tensor
            that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check_lists(params, grads, momentum_buffers, momentum_dtype)
    if torch.compiler.is_compiling():
        _trace(
            params, grads, momentum_buffers, momentum_dtype,
            lr, momentum, dampening, weight_decay, nesterov, maximize, grad_scale, backend,
        )  # fmt: skip
        return
    hyper = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    row = np.array([[float(hyper.get(name, lr)) for name in HYPERS]])
    backends = choose_backends(params, grads, momentum_buffers, backend)
    dtypes = [buffer_dtype(p, momentum_dtype) for p in params]
    for (name, _), index in plan_members(params, backends, dtypes).items():
        buffers: list[Tensor | None] = [
            momentum_buffer_for(name, params[i], momentum_buffers[i], dtypes[i])
            if momentum != 0
            else None
            for i in index
        ]
        plan = PLANS[name](
            PlanSpec(
                params=[params[i] for i in index],
                buffers=buffers,
                first=[momentum != 0 and momentum_buffers[i] is None for i in index],
                groups=[0] * len(index),
                segments=[()],
                eta_min=0.0,
                warmup_steps=0,
                momentum_dtype=momentum_dtype,
            )
        )
        own_grads = [grads[i] for i in index]
        given = Given(own_grads)
        aligned = plan.align(given.of([params[i] for i in index]), own_grads, given)
        plan.step(aligned, row, 0, grad_scale, None)
        copy_back(aligned, own_grads)
        for i, buffer in zip(index, plan.buffers, strict=True):
            if momentum != 0 and grads[i] is not None:
                momentum_buffers[i] = buffer


@torch.library.custom_op(
    "fastfreeze::sgd_",
    mutates_args=("params", "grads", "momentum_buffers"),
    tags=(torch.Tag.cudagraph_unsafe,),  # each call makes a plan, whose tables it copies
)
def _sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first: Sequence[bool],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: float | None,
    backend: str | None,
) -> None:
    """:func:`sgd` as an operator: every tensor there, ``first`` naming the empty buffers."""
    buffers: list[Tensor | None] = [None] * len(params)
    if momentum != 0:
        buffers = [None if f else b for b, f in zip(momentum_buffers, first, strict=True)]
    wide = any(b.dtype != p.dtype for p, b in zip(params, momentum_buffers, strict=False))
    sgd(
        params,
        grads,
        buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        momentum_dtype=torch.float32 if wide else None,
        backend=cast("Backend | None", backend),
    )
    for own, buffer in zip(momentum_buffers, buffers, strict=momentum != 0):
        if buffer is not None and buffer is not own:
            own.copy_(buffer)


_sgd_.register_fake(lambda *_: None)


def _trace(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None],
    momentum_dtype: torch.dtype | None,
    lr: float,
    momentum: float,
    *rest: Any,
) -> None:
    """Put the operator into the graph, over the parameters that have gradients."""
    index = [i for i, g in enumerate(grads) if g is not None]
    first: list[bool] = []
    if momentum != 0:
        first = [momentum_buffers[i] is None for i in index]
        for i in index:
            if momentum_buffers[i] is None:
                dtype = buffer_dtype(params[i], momentum_dtype)
                momentum_buffers[i] = torch.empty_like(params[i], dtype=dtype)
    _sgd_(
        [params[i] for i in index],
        [grads[i] for i in index],
        [momentum_buffers[i] for i in index] if momentum != 0 else [],
        first,
        lr,
        momentum,
        *rest,
    )


def choose_backends(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None],
    backend: Backend | None,
) -> list[Backend]:
    """The backend of each parameter: the one asked for, or the fastest that can take it.

    The reference takes what kernels cannot, and one tensor after the other where some share memory.

    Raises:
        ValueError, BackendUnavailableError: the one asked for cannot run, or cannot take a tensor.
    """
    if backend is not None:
        _library.require(backend)
    if backend == "reference":
        return ["reference"] * len(params)
    members = list(zip(params, grads, buffers, strict=True))
    shared = sharing(members)
    chosen: list[Backend] = []
    for i, (param, grad, buffer) in enumerate(members):
        reason = _unsuitable(param) or _unsuitable_with(param, grad, buffer)
        if reason is None and i in shared:
            reason = (
                "it, its gradient or its momentum shares memory with another of these tensors, or "
                "lies between another's elements"
            )
        if backend is not None:
            reason = _library.refuses_device(backend, param.device) or reason
            if reason:
                raise ValueError(f"backend={backend!r} cannot take parameter {i}: {reason}")
            chosen.append(backend)
        else:
            usable = [] if reason else _library.for_device(param.device)
            chosen.append(usable[0] if usable else "reference")
    return chosen


def plan_members(
    params: Sequence[Tensor], backends: Sequence[Backend], buffer_dtypes: Sequence[torch.dtype]
) -> dict[tuple[Backend, Hashable], list[int]]:
    """Indices of the parameters that can share a plan, by backend and the plan's key."""
    members: dict[tuple[Backend, Hashable], list[int]] = {}
    for i, (p, backend, dtype) in enumerate(zip(params, backends, buffer_dtypes, strict=True)):
        members.setdefault((backend, PLANS[backend].key(p, dtype)), []).append(i)
    return members


def _unsuitable(tensor: Tensor) -> str | None:
    """Why no kernel can update ``tensor``, wherever it is; None if one can."""
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"its dtype is {tensor.dtype}, expected one of {[str(d) for d in KERNEL_DTYPES]}"
    if type(tensor) not in PLAIN:
        return f"it is a {type(tensor).__name__}, whose memory may not be its own"
    if not holds_values(tensor):
        return "its memory does not hold its values (a negated view, or zeros by a flag)"
    if not _is_dense(tensor):
        shape, strides = tuple(tensor.shape), tensor.stride()
        return f"its elements overlap or have gaps (shape {shape}, strides {strides})"
    return None


def _unsuitable_with(param: Tensor, grad: Tensor | None, buffer: Tensor | None) -> str | None:
    """The same for its gradient and its momentum buffer."""
    for what, tensor, dtypes in (
        ("gradient", grad, (param.dtype,)),
        ("momentum buffer", buffer, (param.dtype, buffer_dtype(param, torch.float32))),
    ):
        if tensor is not None and (tensor.layout != torch.strided or tensor.dtype not in dtypes):
            return (
                f"its {what} is {tensor.dtype} and {tensor.layout}, expected {param.dtype} and "
                "torch.strided"
            )
    return None


def momentum_buffer_for(
    backend: Backend, param: Tensor, buffer: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``buffer`` with ``dtype``, and as kernels need it, copied if need be; or new memory."""
    if buffer is None:
        return torch.empty_like(param, dtype=dtype)
    usable = backend == "reference" or (holds_values(buffer) and same_strides(param, buffer))
    if usable and buffer.dtype == dtype:
        return buffer
    return torch.empty_like(param, dtype=dtype).copy_(buffer)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def copy_back(aligned: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Give the gradients what a step has written into their aligned copies."""
    for copy, grad in zip(aligned, grads, strict=True):
        if grad is not None and copy is not None and copy is not grad:
            grad.copy_(copy)


def _check_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None],
    momentum_dtype: torch.dtype | None,
) -> None:
    if not len(params) == len(grads) == len(buffers):
        raise ValueError(
            f"params, grads and momentum_buffers must have equal lengths, got {len(params)}, "
            f"{len(grads)} and {len(buffers)}"
        )
    for name, tensors in (("grads", grads), ("momentum_buffers", buffers)):
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            dtype = buffer_dtype(p, momentum_dtype) if name == "momentum_buffers" else p.dtype
            if t is not None and (t.shape != p.shape or t.dtype != dtype or t.device != p.device):
                raise ValueError(
                    f"{name}[{i}] must match its parameter ({dtype} {tuple(p.shape)} on "
                    f"{p.device}), got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
