"""Fused Adam and AdamW: the plan of each backend."""

from __future__ import annotations

from typing import Any

from fastfreeze.ops._adam_plans import AdamCpuPlan, AdamReferencePlan
from fastfreeze.ops._device_adam import AdamCudaPlan, AdamTritonPlan
from fastfreeze.ops._library import Backend

PLANS: dict[Backend, Any] = {
    "cuda": AdamCudaPlan,
    "triton": AdamTritonPlan,
    "cpu": AdamCpuPlan,
    "reference": AdamReferencePlan,
}
