"""What plans are, and SGD's on the host: the C++ kernel's and the reference's.

A plan holds what stays the same from step to step. Each backend has one, with the same methods.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfreeze.layers.groups import SegmentTable
from fastfreeze.ops._memory import Gaps
from fastfreeze.ops._placements import Given, Look, addresses_of, holds_values, kind_of
from fastfreeze.ops.reference import sgd_reference
from fastfreeze.schedule import Segment

# Columns of a plan's table of hyperparameters, as csrc/sgd_tables.h reads them. Every optimizer's
# begin with lr and end with initial_lr.
HYPERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "initial_lr",
)
KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

Hypers = npt.NDArray[np.float64]

_shape_of = attrgetter("shape")


@dataclass
class PlanSpec:
    """What a plan is made for.

    Attributes:
        params: the tensors to update.
        buffers: their momentum buffers; None where the group has no momentum, or where a parameter
            has never had a gradient.
        first: whether a buffer is still uninitialised memory.
        groups: each parameter's group, an index into the table of hyperparameters.
        segments: each group's schedule; empty where the table's lr counts, which is everywhere or
            nowhere.
        eta_min, warmup_steps: the schedule's.
        momentum_dtype: the buffers' dtype; None for the parameters'.
    """

    params: list[Tensor]
    buffers: list[Tensor | None]
    first: list[bool]
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int
    momentum_dtype: torch.dtype | None


class Spec(Protocol):
    """What specs of all optimizers have in common."""

    params: list[Tensor]
    first: list[bool]
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int


class SgdPlan(Protocol):
    """Tensors that one backend updates together, step after step."""

    on_device: ClassVar[bool]  # grad_scale and found_inf are read there, not by the host
    buffers: list[Tensor | None]

    def __init__(self, spec: PlanSpec) -> None: ...

    @staticmethod
    def key(param: Tensor, state_dtype: torch.dtype) -> Hashable:
        """Parameters of one plan have equal keys."""

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        """From now on, ``align`` refuses gradients in the memory of these tensors."""

    def watch(self, state: Sequence[Tensor]) -> None:
        """From now on, ``align`` refuses to go on if one of these tensors has moved."""

    def hold(self, params: Sequence[Tensor]) -> bool:
        """Whether these, as many as the plan's, are the plan's parameters as it knows them."""

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], given: Given
    ) -> Sequence[Tensor | None]:
        """The gradients as the next ``step`` needs them: themselves, or copies in another layout.

        Args:
            params: those that have a gradient, as they are now.
            grads: one per parameter of the plan, or None.
            given: which have one.

        Raises:
            ValueError: a gradient that this backend cannot take, one that does not match its
                parameter, or one in memory that the step writes; a parameter or buffer has moved.
        """

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        """Update every parameter that has a gradient.

        Args:
            grads: one per parameter, or None; what ``align`` has returned last.
            hypers: float64 [num_groups, len(HYPERS)].
            step: 0-based step at which schedules are evaluated.
            grad_scale: what the gradients are divided by, in place; a number unless ``on_device``.
            found_inf: nothing is updated where it is not 0; None unless ``on_device``.

        Returns:
            Each group's learning rate at ``step + 1``.
        """

    def unstarted(self) -> set[int]:
        """Indices of the parameters whose state has had no step. May wait for the device."""


class PointerPlan:
    """What the plans of kernels share: gradients brought to their parameters' layout.

    Args:
        params: the tensors to update.
        state: what a step writes beside them.
        first: whether a parameter's state is still uninitialised memory.
    """

    def __init__(
        self, params: list[Tensor], state: Sequence[Tensor | None], first: Sequence[bool]
    ) -> None:
        self.params = params
        self._look = Look(params, [*params, *state])
        self._empty = [i for i, p in enumerate(params) if p.numel() == 0]
        self._given = Given([])
        self._addresses: array[int] | None = None  # of the gradients that were aligned last
        self._unstarted = {i for i, is_first in enumerate(first) if is_first}

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        self._look.keep_clear(written)

    def watch(self, state: Sequence[Tensor]) -> None:
        self._look.watch(state)

    def hold(self, params: Sequence[Tensor]) -> bool:
        return self._look.hold(params)

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], given: Given
    ) -> Sequence[Tensor | None]:
        """The gradients with their parameters' strides; their addresses are noted for the step."""
        self._given = given
        self._addresses = self._look.find(params, grads, given)
        if self._addresses is not None:
            return grads
        aligned = [
            g if g is None else self._aligned(p, g) for p, g in zip(self.params, grads, strict=True)
        ]
        self._addresses = addresses_of(aligned)
        return aligned

    def _aligned(self, param: Tensor, grad: Tensor) -> Tensor:
        got, expected = kind_of(grad), kind_of(param)
        if got != expected:
            raise ValueError(
                "this backend cannot take a gradient whose layout, dtype and shape are "
                f"{_in_words(got)}: its parameter's are {_in_words(expected)}"
            )
        if holds_values(grad) and same_strides(param, grad):
            return grad
        return torch.empty_like(param).copy_(grad)

    def _gathered(self) -> array[int]:
        if self._addresses is None:
            raise RuntimeError("align() comes before step()")
        for i in self._empty:  # a gradient without elements has no address, and counts
            self._addresses[i] = int(self._given.flags[i])
        return self._addresses

    def _note_step(self) -> None:
        """Tell PyTorch that the parameters with a gradient were written to, and no others.

        A frozen one must look as it is: unchanged. What is folded from it would be made anew.
        """
        torch.autograd.graph.increment_version(self._given.of(self.params))

    def _started_now(self) -> None:
        if self._unstarted:
            self._unstarted.difference_update(self._given.index)


class HostPlan(PointerPlan):
    """All tensors in one parallel region of a C++ kernel."""

    on_device: ClassVar[bool] = False
    _kernel: ClassVar[str]  # what its operators' names begin with

    def _make(self, spec: Spec, *tables: Tensor) -> None:
        """Make the kernel's plan from its own tables and the schedule."""
        make, self._kernel_step, free = operators(self._kernel)
        self._handle = make(*tables, *segment_table(spec.segments), spec.eta_min, spec.warmup_steps)
        weakref.finalize(self, free, self._handle)
        self._lrs = np.empty(len(spec.segments))
        self._lrs_address = self._lrs.ctypes.data

    @staticmethod
    def key(param: Tensor, state_dtype: torch.dtype) -> Hashable:
        return None

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        self._kernel_step(
            self._handle,
            self._gathered().buffer_info()[0],
            hypers.ctypes.data,
            step,
            1.0 if grad_scale is None else 1.0 / grad_scale,
            grad_scale is not None,
            self._lrs_address,
        )
        self._note_step()
        self._started_now()
        lrs: list[float] = self._lrs.tolist()
        return lrs

    def unstarted(self) -> set[int]:
        return self._unstarted


class CpuPlan(HostPlan):
    """SGD of csrc/cpu/fused_sgd_kernel.cpp."""

    _kernel: ClassVar[str] = "sgd"

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec.params, spec.buffers, spec.first)
        self.buffers = spec.buffers
        dtypes = [
            p.dtype if b is None else b.dtype
            for p, b in zip(spec.params, spec.buffers, strict=True)
        ]
        self._make(
            spec,
            rows(
                addresses_of(spec.params),
                addresses_of(spec.buffers),
                map(Tensor.numel, spec.params),
                spec.groups,
                [SCALAR_TYPES[p.dtype] for p in spec.params],
                [SCALAR_TYPES[dtype] for dtype in dtypes],
                spec.first,
            ),
        )


def operators(kernel: str) -> tuple[Any, Any, Any]:
    """What makes a kernel's plan, takes its step and frees it."""
    make, step, free = (
        getattr(torch.ops.fastfreeze, f"{kernel}_{name}").default
        for name in ("plan", "step", "plan_free")
    )
    return make, step, free


def rows(*columns: Iterable[int]) -> Tensor:
    """The columns side by side: int64 [n, number of columns]."""
    return torch.from_numpy(np.array(list(zip(*columns, strict=True)), np.int64)).reshape(
        -1, len(columns)
    )


def _in_words(kind: tuple[torch.layout, torch.dtype, torch.Size]) -> str:
    return f"{kind[0]}, {kind[1]}, {tuple(kind[2])}"


class TensorwisePlan:
    """Tensor by tensor in PyTorch: every device, dtype and layout."""

    on_device: ClassVar[bool] = False

    def __init__(self, spec: Spec) -> None:
        self.params = spec.params
        self._members = [
            [i for i, g in enumerate(spec.groups) if g == k] for k in range(len(spec.segments))
        ]
        self._rates = rates_of(spec)
        self._kinds = list(map(kind_of, spec.params))
        self._gaps: Gaps | None = None

    @staticmethod
    def key(param: Tensor, state_dtype: torch.dtype) -> Hashable:
        return None

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        self._gaps = Gaps(written)

    def watch(self, state: Sequence[Tensor]) -> None:
        """It keeps no address."""

    def hold(self, params: Sequence[Tensor]) -> bool:
        return list(map(kind_of, params)) == self._kinds

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], given: Given
    ) -> Sequence[Tensor | None]:
        if list(map(kind_of, params)) != given.of(self._kinds):
            raise ValueError("a parameter has another layout, dtype or shape than it had")
        if self._gaps is not None and not self._gaps.hold(grads):
            raise ValueError("a gradient lies in memory that another plan writes")
        if list(map(_shape_of, given.of(grads))) != list(map(_shape_of, params)):
            raise ValueError("a gradient has another shape than its parameter")
        return grads


class ReferencePlan(TensorwisePlan):
    """SGD of fastfreeze/ops/reference.py."""

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._spec = spec
        self.buffers = [None if f else b for b, f in zip(spec.buffers, spec.first, strict=True)]

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        lrs = lrs_at(self._rates, hypers, step)
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
                grad_scale=None if grad_scale is None else float(grad_scale),
                momentum_dtype=self._spec.momentum_dtype,
            )
            for i, buffer in zip(members, buffers, strict=True):
                self.buffers[i] = buffer
        return lrs_at(self._rates, hypers, step + 1)

    def unstarted(self) -> set[int]:
        return {
            i
            for i, (first, buffer) in enumerate(zip(self._spec.first, self.buffers, strict=True))
            if first and buffer is None
        }


def segment_table(segments: Sequence[tuple[Segment, ...]]) -> tuple[Tensor, Tensor]:
    """Rows of all groups' segments (start, length, scale), and where each group's begin."""
    rows = np.array([(s.start, s.length, s.scale) for group in segments for s in group], float)
    begin = np.cumsum([0, *map(len, segments)])
    return (
        torch.from_numpy(rows.reshape(-1, 3)),
        torch.from_numpy(begin).reshape(-1, 1),
    )


def rates_of(spec: Spec) -> SegmentTable | None:
    """The schedule's learning rates; None where the table's lr counts."""
    if not any(spec.segments):
        return None
    return SegmentTable(spec.segments, spec.eta_min, spec.warmup_steps)


def lrs_at(rates: SegmentTable | None, hypers: Hypers, step: int) -> list[float]:
    """Each group's learning rate: the schedule's, or without one the table's."""
    if rates is None:
        lrs: list[float] = hypers[:, 0].tolist()
        return lrs
    return rates.lrs(step, hypers[:, -1])


def dtype_of_state(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of what is kept of a parameter; one asked for is for 16-bit parameters alone."""
    narrow = param.dtype in (torch.float16, torch.bfloat16)
    return state_dtype if state_dtype is not None and narrow else param.dtype


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory hold equal indices in both (dense) tensors."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())
