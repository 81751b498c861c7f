"""Adam's plans on the host: the C++ kernel's and the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor

from fastfreeze.kernels.placements import Given, addresses_of
from fastfreeze.kernels.plans import (
    SCALAR_TYPES,
    HostPlan,
    PlanSpec,
    TensorwisePlan,
    dtype_of_state,
    rows,
)
from fastfreeze.kernels.reference import adam_reference

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


class AdamCpuPlan(HostPlan):
    """Adam and AdamW of csrc/cpu/fused_adam_kernel.cpp."""

    _kernel: ClassVar[str] = "adam"

    def __init__(self, spec: PlanSpec) -> None:
        assert spec.steps is not None
        super().__init__(spec)
        self._steps = spec.steps  # kept alive: the kernel reads and writes there
        dtypes = [
            dtype_of_state(p, spec.state_dtype) if m is None else m.dtype
            for p, m in zip(spec.params, spec.moments["exp_avg"], strict=True)
        ]
        self._make(
            spec,
            rows(
                addresses_of(spec.params),
                *map(_present, spec.moments.values()),
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
    """Adam and AdamW of kernels/reference.py, which takes given moments at step 0 too."""

    def __init__(self, spec: PlanSpec) -> None:
        assert spec.steps is not None
        super().__init__(spec)
        self._steps = spec.steps.unbind()

    def align(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> Sequence[Tensor]:
        for layout in map(_layout_of, grads):
            if layout != torch.strided:
                raise ValueError(f"Adam takes no gradient of layout {layout}")
        return super().align(params, grads, given)

    def _update(
        self,
        members: list[int],
        grads: list[Tensor | None],
        moments: list[list[Tensor | None]],
        lr: float,
        row: list[float],
        grad_scale: float | None,
    ) -> None:
        means, squares, largest = moments
        named = dict(zip(ADAM_HYPERS, row, strict=True))
        adam_reference(
            [self.params[i] for i in members],
            grads,
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
            grad_scale=grad_scale,
            state_dtype=self.state_dtype,
        )
