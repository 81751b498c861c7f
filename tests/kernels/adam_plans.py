"""Adam's plans on their own: specs with garbage for memory, and what their steps must come to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastfreeze.kernels.adam import ADAM_HYPERS, AdamReferencePlan
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import PlanSpec, dtype_of_state

# Of parameters about 1, several steps of 0.01.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-12,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def named(*moments):
    """Means, squares and largest squares as plans take them."""
    return dict(zip(MOMENTS, moments, strict=True))


def hypers(rows=1, lr=0.01, betas=(0.9, 0.999), **values):
    """The table of so many equal groups."""
    values = {"eps": 1e-8, "weight_decay": 0.01, "decoupled": True, **values}
    values |= {"lr": lr, "initial_lr": lr, "beta1": betas[0], "beta2": betas[1]}
    return np.array([[float(values.get(name, 0)) for name in ADAM_HYPERS]] * rows)


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
    like=None,
):
    """Of parameters that have had these steps, or none; the moments' memory holds NaN.

    like: makes what is like a parameter.
    """

    def garbage(p):
        made = torch.empty_like if like is None else like
        return made(p, dtype=dtype_of_state(p, state_dtype)).fill_(torch.nan)

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


def truth_of(spec):
    """The reference's plan of the same parameters; of fp32 ones in fp64."""
    params = [p.detach().cpu() for p in spec.params]
    params = [p.double() if p.dtype == torch.float32 else p.clone() for p in params]
    none = named(*([None] * len(params) for _ in range(3)))
    steps = torch.zeros(len(params))
    return AdamReferencePlan(replace(spec, params=params, moments=none, steps=steps))


def step(plan, grads, table, at=0, grad_scale=None, found_inf=None):
    """One step; grads: one per parameter, or None."""
    given = Given(grads)
    aligned = plan.align(given.of(plan.params), given.of(grads), given)
    return plan.step(aligned, table, at, grad_scale, found_inf)


def step_truth(truth, grads, table, at=0, grad_scale=None):
    """The same of the reference."""
    own = [
        None if g is None else g.detach().cpu().to(p.dtype, copy=True)
        for p, g in zip(truth.params, grads, strict=True)
    ]
    step(truth, own, table, at, None if grad_scale is None else float(grad_scale))


def assert_near(plan, truth):
    for p, t in zip(plan.params, truth.params, strict=True):
        error = (p.detach().cpu().double() - t.double()).abs() / t.double().abs().clamp(min=1)
        assert error.max() <= TOLERANCE[p.dtype]
    for name in MOMENTS:
        for a, b in zip(plan.moments[name], truth.moments[name], strict=True):
            if b is not None:
                error = (a.cpu().double() - b.double()).abs() / b.double().abs().clamp(min=1)
                assert error.max() <= TOLERANCE[a.dtype]
