"""Which backend takes which parameter, with its gradient and its state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfreeze.kernels import library
from fastfreeze.kernels.device_plan import CudaLaunch, TritonLaunch
from fastfreeze.kernels.library import KERNEL_DTYPES, Backend
from fastfreeze.kernels.memory import sharing
from fastfreeze.kernels.placements import PLAIN, holds_values
from fastfreeze.kernels.plans import (
    HostPlan,
    Plan,
    TensorwisePlan,
    dtype_of_state,
    same_strides,
)

PLANS: dict[Backend, type[Plan]] = {
    "cuda": CudaLaunch,
    "triton": TritonLaunch,
    "cpu": HostPlan,
    "reference": TensorwisePlan,
}


def choose_backends(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Sequence[Tensor | None]],
    backend: Backend | None,
) -> list[Backend]:
    """The backend of each parameter: the one asked for, or the fastest that can take it.

    The reference takes what kernels cannot, and one tensor after the other where some share memory.
    ``states``: of each parameter, what the optimizer keeps for it and updates with it.

    Raises:
        ValueError, BackendUnavailableError: the one asked for cannot run, or cannot take a tensor.
    """
    if backend == "reference":
        return ["reference"] * len(params)
    members = list(zip(params, grads, states, strict=True))
    shared = sharing([(param, grad, *state) for param, grad, state in members])
    chosen: list[Backend] = []
    for i, (param, grad, state) in enumerate(members):
        reason = _unsuitable(param) or _unsuitable_with(param, grad, state)
        if reason is None and i in shared:
            reason = (
                "it, its gradient or its state shares memory with another of these tensors, or "
                "lies between another's elements"
            )
        refuses = dict.fromkeys(library.backends(), reason).get
        chosen.append(library.choose(backend, param.device, f"parameter {i}", refuses))
    return chosen


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


def _unsuitable_with(
    param: Tensor, grad: Tensor | None, state: Sequence[Tensor | None]
) -> str | None:
    """The same for its gradient and its state."""
    wide = (param.dtype, dtype_of_state(param, torch.float32))
    for what, tensor, dtypes in (
        ("gradient", grad, (param.dtype,)),
        *(("state", tensor, wide) for tensor in state),
    ):
        if tensor is not None and (tensor.layout != torch.strided or tensor.dtype not in dtypes):
            return (
                f"its {what} is {tensor.dtype} and {tensor.layout}, expected {param.dtype} and "
                "torch.strided"
            )
    return None


def state_for(backend: Backend, param: Tensor, tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A ``tensor`` of the state, copied if it has another dtype or layout; new memory for None."""
    if tensor is None:
        return torch.empty_like(param, dtype=dtype)
    usable = backend == "reference" or (holds_values(tensor) and same_strides(param, tensor))
    if usable and tensor.dtype == dtype:
        return tensor
    return torch.empty_like(param, dtype=dtype).copy_(tensor)


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


def copy_back(aligned: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Give the gradients what a step has written into their aligned copies."""
    for copy, grad in zip(aligned, grads, strict=True):
        if copy is not grad:
            grad.copy_(copy)
