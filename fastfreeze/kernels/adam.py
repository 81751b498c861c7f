"""Fused Adam and AdamW: the plan of each backend."""

from __future__ import annotations

from fastfreeze.kernels.adam_device import AdamCudaPlan, AdamTritonPlan
from fastfreeze.kernels.adam_plans import AdamCpuPlan, AdamReferencePlan
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.plans import Plan

PLANS: dict[Backend, type[Plan]] = {
    "cuda": AdamCudaPlan,
    "triton": AdamTritonPlan,
    "cpu": AdamCpuPlan,
    "reference": AdamReferencePlan,
}
