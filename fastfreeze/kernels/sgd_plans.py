"""SGD's plans on the host: the C++ kernel's and the reference's."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastfreeze.kernels.placements import addresses_of
from fastfreeze.kernels.plans import SCALAR_TYPES, HostPlan, PlanSpec, TensorwisePlan, rows
from fastfreeze.kernels.reference import sgd_reference

# Columns of a plan's table of hyperparameters, as csrc/sgd_tables.h reads them. Every optimizer's
# begin with lr and end with initial_lr.
SGD_HYPERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "initial_lr",
)


class SgdCpuPlan(HostPlan):
    """SGD of csrc/cpu/fused_sgd_kernel.cpp."""

    _kernel: ClassVar[str] = "sgd"

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        [buffers] = spec.moments.values()
        dtypes = [
            p.dtype if b is None else b.dtype for p, b in zip(spec.params, buffers, strict=True)
        ]
        self._make(
            spec,
            rows(
                addresses_of(spec.params),
                addresses_of(buffers),
                map(Tensor.numel, spec.params),
                spec.groups,
                [SCALAR_TYPES[p.dtype] for p in spec.params],
                [SCALAR_TYPES[dtype] for dtype in dtypes],
                spec.first,
            ),
        )


class SgdReferencePlan(TensorwisePlan):
    """SGD of fastfreeze/kernels/reference.py."""

    def _update(
        self,
        members: list[int],
        grads: list[Tensor | None],
        moments: list[list[Tensor | None]],
        lr: float,
        row: list[float],
        grad_scale: float | None,
    ) -> None:
        named = dict(zip(SGD_HYPERS, row, strict=True))
        sgd_reference(
            [self.params[i] for i in members],
            grads,
            *moments,
            lr=lr,
            momentum=named["momentum"],
            dampening=named["dampening"],
            weight_decay=named["weight_decay"],
            nesterov=bool(named["nesterov"]),
            maximize=bool(named["maximize"]),
            grad_scale=grad_scale,
            momentum_dtype=self.state_dtype,
        )
