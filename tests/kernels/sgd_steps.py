"""A step of SGD's plans on their own, as the optimizer has them take it."""

from __future__ import annotations

import numpy as np

from fastfreeze.kernels.choice import choose_backends, copy_back, plan_members, state_for
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import PlanSpec, dtype_of_state
from fastfreeze.kernels.sgd import PLANS, SGD_HYPERS


def sgd(params, grads, buffers, *, lr, grad_scale=None, momentum_dtype=None, backend=None, **hyper):
    """One step in place of what has a gradient; new buffers take the place of None."""
    values = {"lr": lr, "initial_lr": lr, **hyper}
    table = np.array([[float(values.get(name, 0.0)) for name in SGD_HYPERS]])
    keeps = values.get("momentum", 0) != 0
    backends = choose_backends(params, grads, [(b,) for b in buffers], backend)
    dtypes = [dtype_of_state(p, momentum_dtype) for p in params]
    for (name, _), index in plan_members(PLANS, params, backends, dtypes).items():
        own = [state_for(name, params[i], buffers[i], dtypes[i]) if keeps else None for i in index]
        first = [keeps and buffers[i] is None for i in index]
        groups, moments = [0] * len(index), {"momentum_buffer": own}
        mine = [params[i] for i in index]
        spec = PlanSpec(mine, moments, first, groups, [()], 0.0, 0, momentum_dtype)
        plan, given = PLANS[name](spec), Given([grads[i] for i in index])
        own_grads = given.of([grads[i] for i in index])
        aligned = plan.align(given.of(mine), own_grads, given)
        plan.step(aligned, table, 0, grad_scale, None)
        copy_back(aligned, own_grads)
        for i, buffer in zip(index, plan.moments["momentum_buffer"], strict=True):
            if keeps and grads[i] is not None:
                buffers[i] = buffer
