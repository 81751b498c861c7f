"""Plans of the optimizers beside torch's for-loop in float64: both take the same steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fastfreeze.kernels import rules
from fastfreeze.kernels.choice import PLANS, copy_back
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import PlanSpec, dtype_of_state

LR = 0.05
RULES = {"sgd": rules.SGD, "adam": rules.ADAM}
MOMENTS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
TORCHS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
# Relative to values of order one, after four steps: rounding once per step.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case(NamedTuple):
    """A rule, its hyperparameters, what gradients are divided by, the state's dtype."""

    rule: str
    hypers: dict
    grad_scale: float | None = None
    wide: torch.dtype | None = None

    def values(self):
        base = {"lr": LR, "initial_lr": LR}
        if self.rule == "adam":
            base |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decoupled": True}
        return {**dict.fromkeys(RULES[self.rule].hypers, 0), **base, **self.hypers}

    def kept(self):
        """Names of the moments that a parameter has."""
        if self.rule == "sgd":
            return MOMENTS["sgd"] if "momentum" in self.hypers else ()
        return MOMENTS["adam"][: 3 if "amsgrad" in self.hypers else 2]

    def group(self, param):
        """For torch's optimizer."""
        values = self.values()
        if self.rule == "adam":
            values["betas"] = values.pop("beta1"), values.pop("beta2")
            values["decoupled_weight_decay"] = values.pop("decoupled")
        return {"params": [param], **values}


CASES = {
    "sgd": Case("sgd", {}),
    "momentum": Case("sgd", {"momentum": 0.9}),
    "nesterov": Case("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "dampened": Case(
        "sgd", {"momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.1}
    ),
    "momentum, scaled": Case("sgd", {"momentum": 0.9}, 8.0),
    "momentum, wide": Case("sgd", {"momentum": 0.9, "nesterov": True}, wide=torch.float32),
    "adamw": Case("adam", {"weight_decay": 0.1}),
    "adam": Case("adam", {"decoupled": False}),
    "adam, decays": Case("adam", {"decoupled": False, "weight_decay": 0.1, "maximize": True}),
    "amsgrad": Case("adam", {"amsgrad": True}),
    "adam, wide": Case("adam", {"amsgrad": True}, wide=torch.float32),
    "small betas": Case("adam", {"beta1": 0.3, "beta2": 0.5, "amsgrad": True}),
    "no betas": Case("adam", {"beta1": 0.0, "beta2": 0.0}),
    "large eps": Case("adam", {"eps": 0.5}),
    "adam, scaled": Case("adam", {"maximize": True}, 8.0),
}
EACH_RULE = {name: CASES[name] for name in ("nesterov", "amsgrad")}


def spec_of(params, *cases, groups=None, segments=None, first=True, steps=None, moments=None):
    """Of parameters that have had no step; what memory is made for the moments holds NaN."""
    groups = [0] * len(params) if groups is None else groups
    own = [cases[g] for g in groups]

    def memory(p, case, name):
        if name in case.kept():
            return torch.full_like(p, torch.nan, dtype=dtype_of_state(p, case.wide))
        return None

    made = {
        name: [memory(p, case, name) for p, case in zip(params, own, strict=True)]
        for name in MOMENTS[cases[0].rule]
    }
    begin = [first and bool(case.kept()) for case in own]
    segments = [()] * len(cases) if segments is None else segments
    rule, wide = RULES[cases[0].rule], cases[0].wide
    moments = {**made, **(moments or {})}
    return PlanSpec(rule, params, moments, begin, groups, segments, 0.0, 0, wide, steps)


def table_of(*cases):
    """A plan's table of hyperparameters."""
    return np.array([[float(c.values()[name]) for name in RULES[c.rule].hypers] for c in cases])


def take_step(plan, table, grads, step=0, grad_scale=None, found_inf=None):
    """As the optimizer has a plan take one."""
    given = Given(grads)
    aligned = plan.align(given.of(plan.params), given.of(grads), given)
    if grad_scale is not None and plan.on_device:
        grad_scale = torch.full((), grad_scale, device=plan.params[0].device)
    lrs = plan.step(aligned, table, step, grad_scale, found_inf)
    copy_back(aligned, given.of(grads))
    return lrs


class Beside:
    """A plan for some cases, each a group, and torch's for-loop over copies in float64."""

    def __init__(self, backend, params, *cases, groups=None, **options):
        rule, device = cases[0].rule, params[0].device
        self.cases, self.params = cases, params
        self.groups = [0] * len(params) if groups is None else groups
        self.steps = torch.zeros(len(params), device=device) if rule == "adam" else None
        # Adam's kernels take the moments at count 0 as 0, whatever is in their memory.
        options = {"first": rule == "sgd" or backend == "reference", **options}
        spec = spec_of(params, *cases, groups=self.groups, steps=self.steps, **options)
        self.plan, self.table = PLANS[backend](spec), table_of(*cases)
        wide = [torch.nn.Parameter(p.cpu().double().clone()) for p in params]
        own = [self.cases[g].group(p) for g, p in zip(self.groups, wide, strict=True)]
        self.truth, self.wide = TORCHS[rule](own, foreach=False), wide

    def step(self, grads, step=0):
        scale = self.cases[0].grad_scale
        for p, g in zip(self.wide, grads, strict=True):
            p.grad = None if g is None else g.cpu().double() / (scale or 1.0)
        self.truth.step()
        lrs = take_step(self.plan, self.table, grads, step, scale)
        for p, g in zip(self.wide, grads, strict=True):
            if g is not None:
                assert_near(g, p.grad)  # left unscaled
        return lrs

    def assert_near(self):
        for i, (p, g, truth) in enumerate(zip(self.params, self.groups, self.wide, strict=True)):
            assert_near(p, truth)
            state = self.truth.state[truth]
            for name in self.cases[g].kept():
                moment = self.plan.moments[name][i]
                assert moment.dtype == dtype_of_state(p, self.cases[g].wide)
                assert_near(moment, state[name], p.dtype)
            if self.steps is not None:
                assert self.steps[i] == state["step"]


def assert_near(ours, truth, dtype=None):
    truth = truth.detach()
    error = (ours.detach().cpu().double() - truth).abs() / truth.abs().clamp(min=1)
    assert not error.isnan().any()
    assert error.numel() == 0 or error.max() <= TOLERANCE[dtype or ours.dtype]


def random_gradient(n):
    """None near 0, where Adam's change is sensitive."""
    return (torch.rand(n) + 0.5) * torch.randn(n).sign()


def assert_right(backend, case, tensors, steps=4):
    """Some steps; of some parameters a first gradient comes late, of some one is missing.

    Args:
        tensors: takes what makes a tensor of so many elements, and makes one for each parameter.
    """
    beside = Beside(backend, tensors(lambda n: torch.rand(n) + 0.5), case)
    for step in range(steps):
        grads = tensors(random_gradient)
        if steps > 2:
            missing = 1 if step < 2 else 2 if step == 2 else None
            grads = [None if i % 3 == missing else g for i, g in enumerate(grads)]
        beside.step(grads, step)
    beside.assert_near()
    assert beside.plan.unstarted() == set()
