"""Adam's plans on a device."""

from __future__ import annotations

from array import array
from typing import ClassVar

from torch import Tensor

from fastfreeze.kernels.adam_plans import ADAM_HYPERS
from fastfreeze.kernels.device_plan import CudaLaunch, DevicePlan


class DeviceAdam(DevicePlan):
    """The device counts each parameter's steps, in the state's own memory."""

    num_hypers: ClassVar[int] = len(ADAM_HYPERS)
    counts: ClassVar[bool] = True


class AdamCudaPlan(DeviceAdam, CudaLaunch):
    """One launch of csrc/cuda/fused_adam.cuh."""

    kernel: ClassVar[str] = "adam"


class AdamTritonPlan(DeviceAdam):
    """One launch of the kernel in fastfreeze/kernels/adam_triton.py."""

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        from fastfreeze.kernels import adam_triton

        adam_triton.step(self, grad_scale, found_inf)
