"""Plans, and those that the host runs: the C++ kernels' and the reference's.

A plan holds what stays the same from step to step. Each backend has one, with the same methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfreeze.kernels.memory import Gaps
from fastfreeze.kernels.placements import (
    Given,
    Handle,
    Look,
    addresses_of,
    holds_values,
    int64_table,
    kind_of,
)
from fastfreeze.schedule import Segment, SegmentTable

SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

Hypers = npt.NDArray[np.float64]

_shape_of = attrgetter("shape")


@dataclass(frozen=True)
class Rule:
    """How an optimizer updates a parameter, as far as all its kernels agree.

    Attributes:
        name: in the names of its operators and of its Triton kernel's file.
        hypers: columns of a plan's table of hyperparameters, from lr to initial_lr.
        counts: whether a parameter's steps count, and not its first alone.
        takes_sparse: whether the reference takes sparse gradients.
        reference: a step of some parameters, in PyTorch.
    """

    name: str
    hypers: tuple[str, ...]
    counts: bool
    takes_sparse: bool
    reference: Callable[..., None]


@dataclass
class PlanSpec:
    """The parameters of one plan, as this process holds them.

    Attributes:
        rule: of their update.
        params: the tensors to update.
        moments: by the state's name for them, what is kept of each parameter; None where it has
            never had a gradient, or where its group keeps none.
        first: whether a parameter's moments are still uninitialised memory.
        groups: each parameter's, an index into the table of hyperparameters.
        segments: each group's schedule; empty where the table's lr counts, which is everywhere or
            nowhere.
        eta_min, warmup_steps: the schedule's.
        state_dtype: the moments' dtype of 16-bit parameters; None for the parameters'.
        steps: float32 [n], how many steps each parameter has taken, for rules that count: a plan's
            steps advance it, and where it is 0 a kernel takes the moments as 0, whatever their
            memory holds.
    """

    rule: Rule
    params: list[Tensor]
    moments: dict[str, list[Tensor | None]]
    first: list[bool]
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int
    state_dtype: torch.dtype | None
    steps: Tensor | None = None


class Plan(ABC):
    """Tensors that one backend updates together, step after step."""

    on_device: ClassVar[bool] = False  # grad_scale and found_inf are read there, not by the host
    params: list[Tensor]
    moments: dict[str, list[Tensor | None]]

    @abstractmethod
    def __init__(self, spec: PlanSpec) -> None: ...

    @staticmethod
    def key(param: Tensor, state_dtype: torch.dtype) -> Hashable:
        """Parameters of one plan have equal keys."""
        return None

    @abstractmethod
    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        """From now on, ``align`` refuses gradients in the memory of these tensors."""

    @abstractmethod
    def watch(self, state: Sequence[Tensor]) -> None:
        """From now on, ``align`` refuses to go on if one of these tensors has moved."""

    @abstractmethod
    def hold(self, params: Sequence[Tensor]) -> bool:
        """Whether these, as many as the plan's, are the plan's parameters as it knows them."""

    @abstractmethod
    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> Sequence[Tensor]:
        """The gradients as the next ``step`` needs them: themselves, or copies in another layout.

        Args:
            params: those that have a gradient, as they are now.
            grads: theirs.
            given: which of the plan's parameters these are.

        Raises:
            ValueError: a gradient that this backend cannot take, one that does not match its
                parameter, or one in memory that the step writes; a parameter or buffer has moved.
        """

    @abstractmethod
    def step(
        self,
        grads: Sequence[Tensor],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        """Update every parameter that has a gradient.

        Args:
            grads: what ``align`` has returned last.
            hypers: float64 [num_groups, number of the rule's columns].
            step: 0-based step at which schedules are evaluated.
            grad_scale: what the gradients are divided by, in place; a number unless ``on_device``.
            found_inf: nothing is updated where it is not 0; None unless ``on_device``.

        Returns:
            Each group's learning rate at ``step + 1``.
        """

    @abstractmethod
    def unstarted(self) -> set[int]:
        """Indices of the parameters whose state has had no step. May wait for the device."""


class PointerPlan(Plan):
    """What the plans of kernels share: gradients brought to their parameters' layout."""

    def __init__(self, spec: PlanSpec) -> None:
        self.rule, self.params, self.moments = spec.rule, spec.params, spec.moments
        self._look = Look(spec.params, [*spec.params, *chain(*spec.moments.values())])
        self._empty = [i for i, p in enumerate(spec.params) if p.numel() == 0]
        self._given = Given([])
        # The parameters of those. PyTorch is told of a write to these alone: what is folded from a
        # frozen one would be made anew.
        self._updated: Sequence[Tensor] = []
        self._addresses = array("q")  # of the gradients that were aligned last
        self._unstarted = {i for i, is_first in enumerate(spec.first) if is_first}

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        self._look.keep_clear(written)

    def watch(self, state: Sequence[Tensor]) -> None:
        self._look.watch(state)

    def hold(self, params: Sequence[Tensor]) -> bool:
        return self._look.hold(params)

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> Sequence[Tensor]:
        """The gradients with their parameters' strides; their addresses are noted for the step."""
        if given is not self._given:
            self._given, self._updated = given, given.of(self.params)
        aligned, addresses = grads, self._look.find(params, grads, given)
        if addresses is None:
            aligned = list(map(self._aligned, self._updated, grads))
            addresses = addresses_of(given.spread(aligned))
        for i in self._empty:  # a gradient without elements has no address, and counts
            addresses[i] = int(given.flags[i])
        self._addresses = addresses
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


class HostPlan(PointerPlan):
    """All tensors in one parallel region of csrc/cpu/step_kernel.cpp."""

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        moments = list(spec.moments.values())
        dtypes = [
            dtype_of_state(p, spec.state_dtype) if m is None else m.dtype
            for p, m in zip(spec.params, moments[0], strict=True)
        ]
        tensors = zip(
            addresses_of(spec.params),
            *map(_present, moments),
            map(Tensor.numel, spec.params),
            spec.groups,
            [SCALAR_TYPES[p.dtype] for p in spec.params],
            [SCALAR_TYPES[dtype] for dtype in dtypes],
            strict=True,
        )
        self._progress = spec.steps  # kept alive: the kernel reads and writes there
        if self._progress is None:
            self._progress = torch.from_numpy(1 - np.array(spec.first, np.float32))
        self._kernel_step = getattr(torch.ops.fastfreeze, f"{self.rule.name}_step").default
        self._kept = Handle(
            f"{self.rule.name}_plan",
            int64_table(list(tensors), len(moments) + 5),
            self._progress.view(-1, 1),
            *segment_table(spec.segments),
            spec.eta_min,
            spec.warmup_steps,
        )
        self._handle = self._kept.number
        self._lrs = np.empty(len(spec.segments))
        self._lrs_address = self._lrs.ctypes.data
        self._hypers: Hypers | None = None  # whose address is known

    def step(
        self,
        grads: Sequence[Tensor],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        if hypers is not self._hypers:
            self._hypers, self._hypers_address = hypers, hypers.ctypes.data
        self._kernel_step(
            self._handle,
            self._addresses.buffer_info()[0],
            self._hypers_address,
            step,
            1.0 if grad_scale is None else 1.0 / grad_scale,
            grad_scale is not None,
            self._lrs_address,
        )
        torch.autograd.graph.increment_version(self._updated)
        if self._unstarted:
            self._unstarted.difference_update(self._given.index)
        lrs: list[float] = self._lrs.tolist()
        return lrs

    def unstarted(self) -> set[int]:
        return self._unstarted


def _present(moments: Sequence[Tensor | None]) -> list[int]:
    """Their addresses. 0 stands for None alone: a moment without elements is one as well."""
    return [0 if t is None else t.data_ptr() or 1 for t in moments]


def _in_words(kind: tuple[torch.layout, torch.dtype, torch.Size]) -> str:
    return f"{kind[0]}, {kind[1]}, {tuple(kind[2])}"


class TensorwisePlan(Plan):
    """Tensor by tensor in PyTorch: every device, dtype and layout."""

    def __init__(self, spec: PlanSpec) -> None:
        self.rule, self.params, self._first = spec.rule, spec.params, spec.first
        self._state_dtype = spec.state_dtype
        self._steps = None if spec.steps is None else spec.steps.unbind()
        self.moments = {
            name: [None if f else m for m, f in zip(moments, spec.first, strict=True)]
            for name, moments in spec.moments.items()
        }
        self._members = [
            [i for i, g in enumerate(spec.groups) if g == k] for k in range(len(spec.segments))
        ]
        self._rates = rates_of(spec)
        self._kinds = list(map(kind_of, spec.params))
        self._gaps: Gaps | None = None
        self._given = Given([])

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        self._gaps = Gaps(written)

    def watch(self, state: Sequence[Tensor]) -> None:
        """It keeps no address."""

    def hold(self, params: Sequence[Tensor]) -> bool:
        return list(map(kind_of, params)) == self._kinds

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> Sequence[Tensor]:
        if list(map(kind_of, params)) != given.of(self._kinds):
            raise ValueError("a parameter has another layout, dtype or shape than it had")
        if self._gaps is not None and not self._gaps.hold(grads):
            raise ValueError("a gradient lies in memory that another plan writes")
        if list(map(_shape_of, grads)) != list(map(_shape_of, params)):
            raise ValueError("a gradient has another shape than its parameter")
        if not self.rule.takes_sparse and any(grad.layout != torch.strided for grad in grads):
            raise ValueError(f"{self.rule.name} takes no sparse gradient")
        self._given = given
        return grads

    def step(
        self,
        grads: Sequence[Tensor],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        scale = None if grad_scale is None else float(grad_scale)
        each = self._given.spread(grads)
        for g, lr in enumerate(lrs_at(self._rates, hypers, step)):
            members = self._members[g]
            own = [[moments[i] for i in members] for moments in self.moments.values()]
            hyper = dict(zip(self.rule.hypers, hypers[g].tolist(), strict=True))
            hyper |= {"lr": lr, "grad_scale": scale, "state_dtype": self._state_dtype}
            del hyper["initial_lr"]
            params, own_grads = ([of[i] for i in members] for of in (self.params, each))
            steps = [] if self._steps is None else [[self._steps[i] for i in members]]
            self.rule.reference(params, own_grads, *own, *steps, **hyper)
            for moments, updated in zip(self.moments.values(), own, strict=True):
                for i, moment in zip(members, updated, strict=True):
                    moments[i] = moment
        return lrs_at(self._rates, hypers, step + 1)

    def unstarted(self) -> set[int]:
        moments = next(iter(self.moments.values()))
        pairs = zip(self._first, moments, strict=True)
        return {i for i, (first, moment) in enumerate(pairs) if first and moment is None}


def segment_table(segments: Sequence[tuple[Segment, ...]]) -> tuple[Tensor, Tensor]:
    """Rows of all groups' segments (start, length, scale), and where each group's begin."""
    rows = np.array([(s.start, s.length, s.scale) for group in segments for s in group], float)
    begin = np.cumsum([0, *map(len, segments)])
    return (torch.from_numpy(rows.reshape(-1, 3)), torch.from_numpy(begin).reshape(-1, 1))


def rates_of(spec: PlanSpec) -> SegmentTable | None:
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
