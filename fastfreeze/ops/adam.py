"""Fused Adam and AdamW: the plan of each backend."""

from __future__ import annotations

from fastfreeze.ops._adam_plans import AdamCpuPlan, AdamReferencePlan
from fastfreeze.ops._device_adam import AdamCudaPlan, AdamTritonPlan
from fastfreeze.ops._library import Backend
from fastfreeze.ops._plans import Plan

PLANS: dict[Backend, type[Plan]] = {
    "cuda": AdamCudaPlan,
    "triton": AdamTritonPlan,
    "cpu": AdamCpuPlan,
    "reference": AdamReferencePlan,
}
