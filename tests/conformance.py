"""What torch says of torch.optim.SGD (its OptimizerInfo), as tables for tests of fastfreeze.SGD.

Which arguments, schedulers and errors there are is torch's word, of the version that is installed.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("expecttest", reason="torch.testing's own optimizer tests need it")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

TORCHS = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
CONSTRUCTION_ERROR = OptimizerErrorEnum.CONSTRUCTION_ERROR
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def kwargs_of(entry):
    """With tensors of its own: two tests must not share a Tensor lr."""
    return copy.deepcopy(entry.kwargs)


INPUTS = TORCHS.optim_inputs_func(device="cpu")
CONFIGURATIONS = [
    pytest.param({**kwargs_of(entry), **flags}, id=f"{entry.desc}, {name}".replace("/", " "))
    for entry, (name, flags) in itertools.product(INPUTS, IMPLEMENTATIONS.items())
]
every_configuration = pytest.mark.parametrize("kwargs", CONFIGURATIONS)
every_input = pytest.mark.parametrize(
    "kwargs", [pytest.param(kwargs_of(entry), id=entry.desc.replace("/", " ")) for entry in INPUTS]
)
SCHEDULERS = [[], *TORCHS.scheduler_inputs]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (1,), (31,), (32,), (33,), (4097,), (3, 0, 2), (5, 7), (2, 3, 4, 5)]


def truth_of(kwargs):
    """The same for torch's for-loop."""
    return {**{k: v for k, v in kwargs.items() if k not in ("foreach", "fused")}, "foreach": False}


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(
            p.shape, generator=generator, dtype=torch.promote_types(p.dtype, torch.float32)
        )
        p.grad = grad.to(p.dtype)


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()


def momenta(optimizer):
    """Of each parameter, by its place."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]


def assert_same(ours, theirs, dtype=torch.float32):
    """Parameters and momentum; 16-bit ones are rounded once here, after each operation there."""
    tolerance = {torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}.get(dtype, (1e-6, 1e-6))
    pairs = itertools.chain.from_iterable(
        zip(a, b, strict=True)
        for a, b in (
            (
                [p for g in ours.param_groups for p in g["params"]],
                [p for g in theirs.param_groups for p in g["params"]],
            ),
            (momenta(ours), momenta(theirs)),
        )
    )
    for a, b in pairs:
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=tolerance[0], atol=tolerance[1])


@torch.no_grad()
def follow(ours, theirs):
    """Go on from where torch is, so that only one step's rounding is compared."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            p.copy_(q)
    for a, b in zip(momenta(ours), momenta(theirs), strict=True):
        if a is not None:
            a.copy_(b)
