"""Adam and AdamW: the columns of their table, and their plan for each backend."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastfreeze.kernels.device_plan import CudaLaunch, TritonLaunch
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import HostPlan, Plan, PlanSpec, Rule, TensorwisePlan
from fastfreeze.kernels.reference import adam_reference

# As csrc/adam_math.h reads them.
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
ADAM = Rule("adam", ADAM_HYPERS, counts=True)

_layout_of = attrgetter("layout")


class AdamCudaPlan(CudaLaunch):
    rule = ADAM


class AdamTritonPlan(TritonLaunch):
    rule = ADAM


class AdamCpuPlan(HostPlan):
    rule = ADAM


class AdamReferencePlan(TensorwisePlan):
    """It takes given moments at step 0 too."""

    rule = ADAM

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
        **hyper: Any,
    ) -> None:
        means, squares, largest = moments
        params, steps = ([of[i] for i in members] for of in (self.params, self._steps))
        adam_reference(
            params, grads, means, squares, largest, steps, state_dtype=self.state_dtype, **hyper
        )


PLANS: dict[Backend, type[Plan]] = {
    "cuda": AdamCudaPlan,
    "triton": AdamTritonPlan,
    "cpu": AdamCpuPlan,
    "reference": AdamReferencePlan,
}
