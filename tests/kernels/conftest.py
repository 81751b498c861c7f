"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import (
    EMULATED,
    HAS_CPU_KERNELS,
    HAS_GPU,
    ISAS,
    LEVELS,
    kernel,
    kernels,
    resolved,
)
from tests.covering import covering

# As kernels(), the CPU's for each instruction set, and CUDA's emulated where there is no GPU.
STEPPERS = [p for p in kernels() if p.values[0] != ("cpu", "cpu")] + ([] if HAS_GPU else [EMULATED])
STEPPERS += [
    pytest.param((p.id, "cpu"), marks=[*kernel("cpu", "cpu").marks, *p.marks], id=f"cpu-{p.id}")
    for p in ISAS
]


def rows_apart(name, values, **tables):
    """Rows of covering, in which with a GPU each of the values has all pairs of the tables."""
    each = [[value] for value in values] if HAS_GPU else [values]
    return [row for some in each for row in covering(name, **{name: some}, **tables).args[1]]


def by_steppers(steppers=STEPPERS, **tables):
    rows = rows_apart("stepper", steppers, **tables)
    return pytest.mark.parametrize(("stepper", *tables), rows, indirect=["stepper"])


@pytest.fixture
def _isa_as_before():
    before = torch.ops.fastfreeze.cpu_isa(-1) if HAS_CPU_KERNELS else None
    yield
    if before is not None:
        torch.ops.fastfreeze.cpu_isa(before)


@pytest.fixture
def stepper(request, _isa_as_before):
    """A backend of the optimizers' kernels, with one of its instruction sets, and its device."""
    if request.param[0] not in LEVELS:
        return resolved(request)
    torch.ops.fastfreeze.cpu_isa(LEVELS.index(request.param[0]))
    return "cpu", "cpu"


@pytest.fixture
def way(request, monkeypatch, _isa_as_before):
    """The softmax operators in one of the ways of softmax_cases, and the device for them."""
    make, device = request.param
    return make(monkeypatch), device
