"""What an Adam plan is made for, and those of the host: the C++ kernel's and the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor

from fastfreeze.ops._placements import Given, addresses_of
from fastfreeze.ops._plans import (
    SCALAR_TYPES,
    HostPlan,
    Hypers,
    TensorwisePlan,
    dtype_of_state,
    lrs_at,
    rows,
)
from fastfreeze.ops.reference import adam_reference
from fastfreeze.schedule import Segment

# Columns of a plan's table of hyperparameters, as csrc/adam_tables.h reads them.
ADAM_HYPERS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "decoupled",
    "maximize",
    "amsgrad",
    "initial_lr",
)

_layout_of = attrgetter("layout")


@dataclass
class AdamSpec:
    """What a plan is made for.

    Attributes:
        params: the tensors to update.
        exp_avgs, exp_avg_sqs: their moments; None where a parameter has never had a gradient.
        max_exp_avg_sqs: the same, and None where the group has no amsgrad.
        steps: float32 [n], how many steps each parameter has taken; a plan's steps advance it.
            Where it is 0 a kernel takes the moments as 0, whatever their memory holds.
        first: whether a parameter's moments are still uninitialised memory, and its steps 0.
        groups: each parameter's group, an index into the table of hyperparameters.
        segments: each group's schedule; empty where the table's lr counts, which is everywhere or
            nowhere.
        eta_min, warmup_steps: the schedule's.
        state_dtype: the moments' dtype; None for the parameters'.
    """

    params: list[Tensor]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    max_exp_avg_sqs: list[Tensor | None]
    steps: Tensor
    first: list[bool]
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int
    state_dtype: torch.dtype | None

    @property
    def moments(self) -> list[list[Tensor | None]]:
        """``exp_avgs``, ``exp_avg_sqs`` and ``max_exp_avg_sqs``."""
        return [self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs]


class AdamCpuPlan(HostPlan):
    """Adam and AdamW of csrc/cpu/fused_adam_kernel.cpp."""

    _kernel: ClassVar[str] = "adam"

    def __init__(self, spec: AdamSpec) -> None:
        state = [t for tensors in spec.moments for t in tensors]
        super().__init__(spec.params, state, spec.first)
        self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs = spec.moments
        self._steps = spec.steps  # kept alive: the kernel reads and writes there
        dtypes = [
            dtype_of_state(p, spec.state_dtype) if m is None else m.dtype
            for p, m in zip(spec.params, spec.exp_avgs, strict=True)
        ]
        self._make(
            spec,
            rows(
                addresses_of(spec.params),
                *map(_present, spec.moments),
                map(Tensor.numel, spec.params),
                spec.groups,
                [SCALAR_TYPES[p.dtype] for p in spec.params],
                [SCALAR_TYPES[dtype] for dtype in dtypes],
            ),
            spec.steps.view(-1, 1),
        )


def _present(moments: Sequence[Tensor | None]) -> list[int]:
    """Their addresses, 0 for None alone: the kernel asks who has moments, of no elements too."""
    return [0 if t is None else t.data_ptr() or 1 for t in moments]


class AdamReferencePlan(TensorwisePlan):
    """Adam and AdamW of fastfreeze/ops/reference.py, which takes given moments at step 0 too."""

    def __init__(self, spec: AdamSpec) -> None:
        super().__init__(spec)
        self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs = map(list, spec.moments)
        self._steps = spec.steps.unbind()
        self._state_dtype = spec.state_dtype

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], given: Given
    ) -> Sequence[Tensor | None]:
        for layout in map(_layout_of, given.of(grads)):
            if layout != torch.strided:
                raise ValueError(f"Adam takes no gradient of layout {layout}")
        return super().align(params, grads, given)

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        lrs = lrs_at(self._rates, hypers, step)
        frozen = set() if self._rates is None else self._rates.frozen(step)
        for g in set(range(len(lrs))) - frozen:
            self._step_group(g, lrs[g], grads, hypers[g].tolist(), grad_scale)
        return lrs_at(self._rates, hypers, step + 1)

    def _step_group(
        self,
        g: int,
        lr: float,
        grads: Sequence[Tensor | None],
        row: list[float],
        grad_scale: Tensor | float | None,
    ) -> None:
        members = self._members[g]
        named = dict(zip(ADAM_HYPERS, row, strict=True))
        moments = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs)
        means, squares, largest = own = [[each[i] for i in members] for each in moments]
        adam_reference(
            [self.params[i] for i in members],
            [grads[i] for i in members],
            means,
            squares,
            largest,
            [self._steps[i] for i in members],
            lr=lr,
            beta1=named["beta1"],
            beta2=named["beta2"],
            eps=named["eps"],
            weight_decay=named["weight_decay"],
            decoupled=bool(named["decoupled"]),
            maximize=bool(named["maximize"]),
            amsgrad=bool(named["amsgrad"]),
            grad_scale=None if grad_scale is None else float(grad_scale),
            state_dtype=self._state_dtype,
        )
        for each, tensors in zip(moments, own, strict=True):
            for i, tensor in zip(members, tensors, strict=True):
                each[i] = tensor

    def unstarted(self) -> set[int]:
        return {i for i, exp_avg in enumerate(self.exp_avgs) if exp_avg is None}
