"""What torch says of its optimizers (its OptimizerInfo), as tables for tests of those here.

Which arguments, schedulers and errors there are is torch's word, of the version that is installed.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

import fastfreeze

pytest.importorskip("expecttest", reason="torch.testing's own optimizer tests need it")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db


class Pair(NamedTuple):
    """An optimizer here, torch's of its name and what that says, and arguments that keep state."""

    ours: type
    theirs: type
    info: Any
    keeping: dict


def pair_of(name, **keeping):
    theirs = getattr(torch.optim, name)
    info = next(info for info in optim_db if info.optim_cls is theirs)
    return Pair(getattr(fastfreeze, name), theirs, info, keeping)


PAIRS = {
    "SGD": pair_of("SGD", lr=0.1, momentum=0.9),
    "Adam": pair_of("Adam", lr=0.1, amsgrad=True),
    "AdamW": pair_of("AdamW", lr=0.1),
}
TORCHS = PAIRS["SGD"].info
CONSTRUCTION_ERROR = OptimizerErrorEnum.CONSTRUCTION_ERROR


def kwargs_of(entry):
    """With tensors of its own: two tests must not share a Tensor lr."""
    return copy.deepcopy(entry.kwargs)


def inputs_of(pair):
    return pair.info.optim_inputs_func(device="cpu")


def with_pairs(names, values_of):
    """A test's arguments ``pair`` and ``names``, once for each of ``values_of(pair)``."""
    return pytest.mark.parametrize(
        ("pair", *names),
        [
            pytest.param(pair, *values, id=f"{name}, {desc}".replace("/", " ").strip(", "))
            for name, pair in PAIRS.items()
            for desc, *values in values_of(pair)
        ],
    )


every_pair = with_pairs([], lambda pair: [[""]])
every_input = with_pairs(
    ["kwargs"], lambda pair: [(entry.desc, kwargs_of(entry)) for entry in inputs_of(pair)]
)
SCHEDULERS = [
    *TORCHS.scheduler_inputs,
    [lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)],
    [lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)],
]


def _followed(pair):
    """Each of torch's lists of schedulers, with inputs in turn; with a tensor lr all of them."""
    inputs = inputs_of(pair)
    rows = [(made, inputs[i % len(inputs)]) for i, made in enumerate(SCHEDULERS)]
    rows += [(made, e) for made in SCHEDULERS for e in inputs if e.desc == "tensor lr"]
    return [
        (f"{entry.desc}, {SCHEDULERS.index(made)}: {len(made)} schedulers", kwargs_of(entry), made)
        for made, entry in rows
    ]


every_scheduler = with_pairs(["kwargs", "schedulers"], _followed)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (1,), (31,), (32,), (33,), (4097,), (3, 0, 2), (5, 7), (2, 3, 4, 5)]


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        dtype = torch.promote_types(p.dtype, torch.float32)
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.dtype)


def run(optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params_of(optimizer), step)
        optimizer.step()
    return optimizer


def tensors_of(optimizer):
    """By name, what the optimizer has of each parameter that has it: itself, and its state."""
    params = params_of(optimizer)
    found = {"itself": [p.detach() for p in params]}
    for p in params:
        for name, tensor in optimizer.state.get(p, {}).items():
            if tensor is not None:
                found.setdefault(name, []).append(tensor)
    return found


def assert_same(ours, theirs):
    """Parameters and state; 16-bit ones are rounded once here, after each operation there."""
    mine, others = tensors_of(ours), tensors_of(theirs)
    assert mine.keys() == others.keys()
    for name, expected in others.items():
        assert [(t.shape, t.dtype) for t in mine[name]] == [(t.shape, t.dtype) for t in expected]
        for dtype in {t.dtype for t in expected}:
            near = {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-6)
            own, other = (
                torch.cat([t.to_dense().flatten() for t in tensors if t.dtype == dtype])
                for tensors in (mine[name], expected)
            )
            torch.testing.assert_close(own, other, rtol=near, atol=near)


@torch.no_grad()
def follow(ours, theirs):
    """Go on from where torch is, so that only the rounding of the steps since is compared."""
    mine = tensors_of(ours)
    for name, tensors in tensors_of(theirs).items():
        for own, other in zip(mine[name], tensors, strict=True):
            own.copy_(other)
