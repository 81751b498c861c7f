"""Fused SGD: the functional form, and the plans that an optimizer steps.

A plan holds what stays the same from step to step. Each backend has one, with the same methods.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfreeze.ops import _library
from fastfreeze.ops._library import Backend
from fastfreeze.ops.reference import sgd_reference
from fastfreeze.schedule import Segment, segments_lr

# Columns of a plan's hyperparameter table, as csrc/cpu/fused_sgd_kernel.cpp reads them.
HYPERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "initial_lr",
)
CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_data_ptr = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous


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
    backend: Backend | None = None,
) -> None:
    """One SGD step in place, with ``torch.optim.SGD``'s arithmetic.

    Args:
        params: tensors to update, of any shapes, strides and dtypes.
        grads: their gradients, of the same shapes and dtypes; None leaves a parameter as it is.
        momentum_buffers: one per parameter; None where a parameter has had no step yet, and
            replaced by a buffer if ``momentum`` is not 0. The first step copies the gradient into
            it, undampened.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        grad_scale: what the loss was multiplied by; the gradients are divided by it in place.
        backend: what runs it; None chooses the fastest that can.

    Raises:
        ValueError: lists of different lengths, a gradient of another shape or dtype, or a tensor
            that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    _check_lists(params, grads, momentum_buffers)
    hyper = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    chosen = choose_backends(params, backend)
    row = np.array([[float(hyper.get(name, lr)) for name in HYPERS]])
    for name in set(chosen):
        index = [i for i, b in enumerate(chosen) if b == name]
        buffers = [momentum_buffers[i] for i in index]
        first = [b is None for b in buffers]
        if momentum != 0:
            buffers = [
                momentum_buffer_like(params[i], b) for i, b in zip(index, buffers, strict=True)
            ]
        else:
            buffers = [None] * len(index)
        plan = PLANS[name]([params[i] for i in index], buffers, first, [0] * len(index), [()], 0.0)
        own_grads = [grads[i] for i in index]
        aligned = plan.align(own_grads)
        plan.step(aligned, row, 0, grad_scale)
        copy_back(aligned, own_grads)
        for i, buffer in zip(index, plan.buffers, strict=True):
            if momentum != 0 and grads[i] is not None:
                momentum_buffers[i] = buffer


class SgdPlan(Protocol):
    """Tensors that one backend updates together, step after step.

    Args of the constructor:
        params: the tensors.
        buffers: their momentum buffers; all None without momentum in the parameter's group.
        first: whether a buffer is still uninitialised memory.
        groups: each parameter's group, an index into the hyperparameter table.
        segments: each group's schedule; empty where the table's lr counts.
        eta_min: the schedule's lower bound.
    """

    buffers: list[Tensor | None]

    def __init__(
        self,
        params: list[Tensor],
        buffers: list[Tensor | None],
        first: list[bool],
        groups: list[int],
        segments: Sequence[tuple[Segment, ...]],
        eta_min: float,
    ) -> None: ...

    def align(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients as ``step`` needs them: themselves, or copies in another layout.

        Raises:
            ValueError: a gradient that this backend cannot take.
        """

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: npt.NDArray[np.float64],
        step: int,
        grad_scale: float | None,
    ) -> list[float]:
        """Update every parameter that has a gradient.

        Args:
            grads: one per parameter, of its shape, dtype and device, or None; aligned.
            hypers: float64 [num_groups, len(HYPERS)].
            step: 0-based step at which schedules are evaluated.
            grad_scale: what the gradients are divided by, in place.

        Returns:
            Each group's learning rate at ``step + 1``.
        """


class CpuPlan:
    """All tensors in one parallel region of the C++ kernel."""

    def __init__(
        self,
        params: list[Tensor],
        buffers: list[Tensor | None],
        first: list[bool],
        groups: list[int],
        segments: Sequence[tuple[Segment, ...]],
        eta_min: float,
    ) -> None:
        self.params, self.buffers = params, buffers
        table = [
            (
                p.data_ptr(),
                0 if b is None else b.data_ptr(),
                p.numel(),
                g,
                _SCALAR_TYPES[p.dtype],
                f,
            )
            for p, b, f, g in zip(params, buffers, first, groups, strict=True)
        ]
        rows = [(s.start, s.length, s.scale) for group in segments for s in group]
        begin = np.cumsum([0, *map(len, segments)])
        self._handle = torch.ops.fastfreeze.sgd_plan(
            torch.tensor(table, dtype=torch.int64).reshape(-1, 6),
            torch.tensor(rows, dtype=torch.float64).reshape(-1, 3),
            torch.from_numpy(begin).reshape(-1, 1),
            eta_min,
        )
        weakref.finalize(self, torch.ops.fastfreeze.sgd_plan_free, self._handle)
        self._contiguous = all(map(_is_contiguous, params))
        self._lrs = np.empty(len(segments))
        self._lrs_address = self._lrs.ctypes.data

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: npt.NDArray[np.float64],
        step: int,
        grad_scale: float | None,
    ) -> list[float]:
        try:
            pointers = array("q", map(_data_ptr, grads))  # type: ignore[arg-type]
        except TypeError:  # a gradient is None
            pointers = array("q", [0 if g is None else g.data_ptr() for g in grads])
        torch.ops.fastfreeze.sgd_step(
            self._handle,
            pointers.buffer_info()[0],
            hypers.ctypes.data,
            step,
            1.0 if grad_scale is None else 1.0 / grad_scale,
            grad_scale is not None,
            self._lrs_address,
        )
        torch.autograd.graph.increment_version(self.params)
        lrs: list[float] = self._lrs.tolist()
        return lrs

    def align(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients with their parameters' strides."""
        try:
            if self._contiguous and all(map(_is_contiguous, grads)):  # type: ignore[arg-type]
                return grads
        except (TypeError, RuntimeError):  # a gradient is None, or has no strides
            pass
        for i, g in enumerate(grads):
            if g is not None and g.layout != torch.strided:
                raise ValueError(f"backend='cpu' cannot take the {g.layout} gradient {i}")
        return [
            g if g is None or same_strides(p, g) else torch.empty_like(p).copy_(g)
            for p, g in zip(self.params, grads, strict=True)
        ]


class ReferencePlan:
    """Tensor by tensor in PyTorch: every device, dtype and layout."""

    def __init__(
        self,
        params: list[Tensor],
        buffers: list[Tensor | None],
        first: list[bool],
        groups: list[int],
        segments: Sequence[tuple[Segment, ...]],
        eta_min: float,
    ) -> None:
        self.params = params
        self.buffers = [None if f else b for b, f in zip(buffers, first, strict=True)]
        self._members = [[i for i, g in enumerate(groups) if g == k] for k in range(len(segments))]
        self._segments, self._eta_min = segments, eta_min

    def align(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return grads

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: npt.NDArray[np.float64],
        step: int,
        grad_scale: float | None,
    ) -> list[float]:
        lrs = self._lrs(hypers, step)
        for members, lr, row in zip(self._members, lrs, hypers, strict=True):
            buffers = [self.buffers[i] for i in members]
            named = dict(zip(HYPERS, row.tolist(), strict=True))
            sgd_reference(
                [self.params[i] for i in members],
                [grads[i] for i in members],
                buffers,
                lr=lr,
                momentum=named["momentum"],
                dampening=named["dampening"],
                weight_decay=named["weight_decay"],
                nesterov=bool(named["nesterov"]),
                maximize=bool(named["maximize"]),
                grad_scale=grad_scale,
            )
            for i, buffer in zip(members, buffers, strict=True):
                self.buffers[i] = buffer
        return self._lrs(hypers, step + 1)

    def _lrs(self, hypers: npt.NDArray[np.float64], step: int) -> list[float]:
        initial = hypers[:, HYPERS.index("initial_lr")]
        lrs: list[float] = hypers[:, HYPERS.index("lr")].tolist()
        for g, segments in enumerate(self._segments):
            if segments:
                lrs[g] = float(segments_lr(segments, step, initial[g], self._eta_min))
        return lrs


PLANS: dict[Backend, type[Any]] = {"cpu": CpuPlan, "reference": ReferencePlan}


def choose_backends(params: Sequence[Tensor], backend: Backend | None) -> list[Backend]:
    """The backend of each parameter: the one asked for, or the fastest that can take it.

    Raises:
        ValueError, BackendUnavailableError: the one asked for cannot run, or cannot take a tensor.
    """
    if backend is None:
        has_cpu = _library.backends()["cpu"].available
        return ["cpu" if has_cpu and not cpu_refuses(p) else "reference" for p in params]
    _library.require(backend)
    if backend == "cpu":
        for i, p in enumerate(params):
            reason = cpu_refuses(p)
            if reason:
                raise ValueError(f"backend='cpu' cannot take parameter {i}: {reason}")
    return [backend] * len(params)


def cpu_refuses(tensor: Tensor) -> str | None:
    """Why the C++ kernel cannot update ``tensor``; None if it can."""
    if tensor.device.type != "cpu":
        return f"it is on {tensor.device}"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.dtype not in CPU_DTYPES:
        return f"its dtype is {tensor.dtype}, expected one of {[str(d) for d in CPU_DTYPES]}"
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"it is a {type(tensor).__name__}, whose memory may not be its own"
    if not _is_dense(tensor):
        shape, strides = tuple(tensor.shape), tensor.stride()
        return f"its elements overlap or have gaps (shape {shape}, strides {strides})"
    return None


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory hold equal indices in both (dense) tensors."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def momentum_buffer_like(param: Tensor, buffer: Tensor | None) -> Tensor:
    """``buffer`` with ``param``'s dtype and strides, copied if need be; new memory for None."""
    if buffer is None:
        return torch.empty_like(param)
    if buffer.dtype == param.dtype and (buffer.is_sparse or same_strides(param, buffer)):
        return buffer
    return torch.empty_like(param).copy_(buffer)


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
    params: Sequence[Tensor], grads: Sequence[Tensor | None], buffers: Sequence[Tensor | None]
) -> None:
    if not len(params) == len(grads) == len(buffers):
        raise ValueError(
            f"params, grads and momentum_buffers must have equal lengths, got {len(params)}, "
            f"{len(grads)} and {len(buffers)}"
        )
    for name, tensors in (("grads", grads), ("momentum_buffers", buffers)):
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t is not None and (t.shape != p.shape or t.dtype != p.dtype or t.device != p.device):
                raise ValueError(
                    f"{name}[{i}] must match its parameter ({p.dtype} {tuple(p.shape)} on "
                    f"{p.device}), got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
