"""Specs of Adam's plans, with garbage for memory."""

from __future__ import annotations

import torch

from fastfreeze.kernels.plans import PlanSpec, dtype_of_state

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def named(*moments):
    """Means, squares and largest squares as plans take them."""
    return dict(zip(MOMENTS, moments, strict=True))


def spec_of(
    params,
    *,
    amsgrad=False,
    groups=None,
    segments=((),),
    eta_min=0.0,
    warmup_steps=0,
    state_dtype=None,
    steps=None,
):
    """Of parameters that have had these steps, or none; the moments' memory holds NaN."""

    def garbage(p):
        return torch.empty_like(p, dtype=dtype_of_state(p, state_dtype)).fill_(torch.nan)

    means, squares, largest = ([garbage(p) for p in params] for _ in range(3))
    return PlanSpec(
        params=params,
        moments=named(means, squares, largest if amsgrad else [None] * len(params)),
        steps=torch.zeros(len(params), device=params[0].device) if steps is None else steps,
        first=[steps is None] * len(params),
        groups=[0] * len(params) if groups is None else groups,
        segments=segments,
        eta_min=eta_min,
        warmup_steps=warmup_steps,
        state_dtype=state_dtype,
    )
