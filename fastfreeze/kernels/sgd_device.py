"""SGD's plans on a device."""

from __future__ import annotations

from array import array
from typing import ClassVar

from torch import Tensor

from fastfreeze.kernels.device_plan import CudaLaunch, DevicePlan
from fastfreeze.kernels.sgd_plans import SGD_HYPERS


class DeviceSgd(DevicePlan):
    """Of a momentum buffer the device knows whether it has had its first step."""

    num_hypers: ClassVar[int] = len(SGD_HYPERS)
    counts: ClassVar[bool] = False


class SgdCudaPlan(DeviceSgd, CudaLaunch):
    """One launch of csrc/cuda/fused_sgd.cuh."""

    kernel: ClassVar[str] = "sgd"


class SgdTritonPlan(DeviceSgd):
    """One launch of the kernel in fastfreeze/kernels/sgd_triton.py."""

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        from fastfreeze.kernels import sgd_triton

        sgd_triton.step(self, grad_scale, found_inf, track)
