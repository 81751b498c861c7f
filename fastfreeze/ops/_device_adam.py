"""Adam's plans on a device."""

from __future__ import annotations

from array import array
from typing import ClassVar

from torch import Tensor

from fastfreeze.ops._adam_plans import ADAM_HYPERS, AdamSpec
from fastfreeze.ops._device_plan import CudaLaunch, DevicePlan


class DeviceAdam(DevicePlan):
    """The device counts each parameter's steps, in the state's own memory."""

    num_hypers: ClassVar[int] = len(ADAM_HYPERS)
    counts: ClassVar[bool] = True

    def __init__(self, spec: AdamSpec) -> None:
        super().__init__(spec, spec.moments, spec.state_dtype, spec.steps.view(-1, 1))
        self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs = spec.moments


class AdamCudaPlan(DeviceAdam, CudaLaunch):
    """One launch of csrc/cuda/fused_adam.cuh."""

    kernel: ClassVar[str] = "adam"


class AdamTritonPlan(DeviceAdam):
    """One launch of the kernel in fastfreeze/ops/_triton_adam.py."""

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        from fastfreeze.ops import _triton_adam

        _triton_adam.step(self, grad_scale, found_inf)
