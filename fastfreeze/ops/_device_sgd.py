"""SGD's plans on a device."""

from __future__ import annotations

from array import array
from typing import ClassVar

import numpy as np
from torch import Tensor

from fastfreeze.ops._device_plan import CudaLaunch, DevicePlan
from fastfreeze.ops._plans import HYPERS, PlanSpec


class DeviceSgd(DevicePlan):
    """Of a momentum buffer the device knows whether it has had its first step."""

    num_hypers: ClassVar[int] = len(HYPERS)
    counts: ClassVar[bool] = False

    def __init__(self, spec: PlanSpec) -> None:
        started = np.array(spec.first, np.uint8).reshape(-1, 1) ^ 1
        super().__init__(spec, [spec.buffers], spec.momentum_dtype, started)
        self.buffers = spec.buffers


class CudaPlan(DeviceSgd, CudaLaunch):
    """One launch of csrc/cuda/fused_sgd.cuh."""

    kernel: ClassVar[str] = "sgd"


class TritonPlan(DeviceSgd):
    """One launch of the kernel in fastfreeze/ops/_triton_sgd.py."""

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        from fastfreeze.ops import _triton_sgd

        _triton_sgd.step(self, grad_scale, found_inf, track)
