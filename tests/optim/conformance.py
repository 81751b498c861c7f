"""What torch says of its optimizers (its OptimizerInfo), as tables for tests of those here.

Which arguments, schedulers and errors there are is torch's word, of the version that is installed.
"""

from __future__ import annotations

import copy
import itertools
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
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


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
every_configuration = with_pairs(  # the flags have no effect here: one of them for each input
    ["kwargs"],
    lambda pair: [
        (f"{entry.desc}, {name}", {**kwargs_of(entry), **flags})
        for entry, (name, flags) in zip(
            inputs_of(pair), itertools.cycle(IMPLEMENTATIONS.items()), strict=False
        )
    ],
)
every_error = with_pairs(
    ["entry"],
    lambda pair: [
        (entry.optimizer_error_input.desc, entry)
        for entry in pair.info.optim_error_inputs_func("cpu", torch.float32)
    ],
)
SCHEDULERS = TORCHS.scheduler_inputs


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


def states(optimizer):
    """The tensors that are kept of each parameter, by its place."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = [optimizer.state.get(p, {}) for p in params]
    return [{name: t for name, t in state.items() if t is not None} for state in found]


def assert_same(ours, theirs, dtype=torch.float32):
    """Parameters and state; 16-bit ones are rounded once here, after each operation there."""
    tolerance = {torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}.get(dtype, (1e-6, 1e-6))
    near = {"rtol": tolerance[0], "atol": tolerance[1]}
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, **near)
    for mine, other in zip(states(ours), states(theirs), strict=True):
        assert list(mine) == list(other)
        for name, tensor in other.items():
            torch.testing.assert_close(mine[name], tensor, **near)


@torch.no_grad()
def follow(ours, theirs):
    """Go on from where torch is, so that only one step's rounding is compared."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            p.copy_(q)
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for name, tensor in other.items():
            mine[name].copy_(tensor)
