"""SGD: the columns of its table, and its plan for each backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastfreeze.kernels.device_plan import CudaLaunch, TritonLaunch
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.plans import HostPlan, Plan, Rule, TensorwisePlan
from fastfreeze.kernels.reference import sgd_reference

# As csrc/sgd_math.h reads them.
SGD_HYPERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "initial_lr",
)
SGD = Rule("sgd", SGD_HYPERS, counts=False)


class SgdCudaPlan(CudaLaunch):
    rule = SGD


class SgdTritonPlan(TritonLaunch):
    rule = SGD


class SgdCpuPlan(HostPlan):
    rule = SGD


class SgdReferencePlan(TensorwisePlan):
    rule = SGD

    def _update(
        self,
        members: list[int],
        grads: list[Tensor | None],
        moments: list[list[Tensor | None]],
        **hyper: Any,
    ) -> None:
        params = [self.params[i] for i in members]
        sgd_reference(params, grads, *moments, momentum_dtype=self.state_dtype, **hyper)


PLANS: dict[Backend, type[Plan]] = {
    "cuda": SgdCudaPlan,
    "triton": SgdTritonPlan,
    "cpu": SgdCpuPlan,
    "reference": SgdReferencePlan,
}
