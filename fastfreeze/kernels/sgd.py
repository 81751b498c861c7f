"""Fused SGD: the functional form, and the plan of each backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastfreeze.kernels.choice import choose_backends, copy_back, plan_members, state_for
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import Plan, PlanSpec, dtype_of_state
from fastfreeze.kernels.sgd_device import SgdCudaPlan, SgdTritonPlan
from fastfreeze.kernels.sgd_plans import SGD_HYPERS, SgdCpuPlan, SgdReferencePlan

PLANS: dict[Backend, type[Plan]] = {
    "cuda": SgdCudaPlan,
    "triton": SgdTritonPlan,
    "cpu": SgdCpuPlan,
    "reference": SgdReferencePlan,
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
    row = np.array([[float(hyper.get(name, lr)) for name in SGD_HYPERS]])
    backends = choose_backends(params, grads, [(b,) for b in momentum_buffers], backend)
    dtypes = [dtype_of_state(p, momentum_dtype) for p in params]
    for (name, _), index in plan_members(PLANS, params, backends, dtypes).items():
        buffers: list[Tensor | None] = [
            state_for(name, params[i], momentum_buffers[i], dtypes[i]) if momentum != 0 else None
            for i in index
        ]
        plan = PLANS[name](
            PlanSpec(
                params=[params[i] for i in index],
                moments={"momentum_buffer": buffers},
                first=[momentum != 0 and momentum_buffers[i] is None for i in index],
                groups=[0] * len(index),
                segments=[()],
                eta_min=0.0,
                warmup_steps=0,
                state_dtype=momentum_dtype,
            )
        )
        given = Given([grads[i] for i in index])
        own_grads = given.of([grads[i] for i in index])
        aligned = plan.align(given.of([params[i] for i in index]), own_grads, given)
        plan.step(aligned, row, 0, grad_scale, None)
        copy_back(aligned, own_grads)
        for i, buffer in zip(index, plan.moments["momentum_buffer"], strict=True):
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
                dtype = dtype_of_state(params[i], momentum_dtype)
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
            dtype = dtype_of_state(p, momentum_dtype) if name == "momentum_buffers" else p.dtype
            if t is not None and (t.shape != p.shape or t.dtype != dtype or t.device != p.device):
                raise ValueError(
                    f"{name}[{i}] must match its parameter ({dtype} {tuple(p.shape)} on "
                    f"{p.device}), got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
