"""Placements: what is seen of tensors that have moved or changed, in C++ and in Python."""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels import placements
from fastfreeze.kernels.placements import Given, Look
from tests.conftest import needs_cpu_kernels


@pytest.fixture(
    autouse=True, params=[pytest.param(True, marks=needs_cpu_kernels), False], ids=["C++", "Python"]
)
def _compiled_or_not(request, monkeypatch):
    monkeypatch.setattr(placements, "has_library", lambda: request.param)


def tensors():
    torch.manual_seed(0)
    return [
        torch.randn(4, 4),
        torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.empty(0, 3),
        torch.randn(1, 6),
        torch.randn(33, dtype=torch.float16),
        torch.randn(8)[::2],
    ]


CHANGES = {
    "moved": lambda t: t.clone(),
    "transposed": lambda t: t.as_strided((4, 4), (1, 4)),
    "another dtype": lambda t: t.view(torch.int32),
    "reshaped": lambda t: t.view(2, 8),
    "flattened": lambda t: t.view(16),
    "fewer rows": lambda t: t[:3],
    "sparse": lambda t: t.to_sparse(),
}


def look_at(own, grads, params=None):
    given = Given(grads)
    params = own if params is None else params
    return Look(own, own).find(given.of(params), given.of(grads), given)


def test_the_same_tensors_hold():
    own = tensors()
    look = Look(own, own)
    assert look.hold(own)
    assert look.hold([t.detach() for t in own])
    assert not look.hold([*own[:-2], own[-1], own[-2]])
    assert not look.hold(own[:-1])
    assert not look.hold([*own, own[0]])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tensor_does_not_hold(change):
    own = tensors()
    assert not Look(own, own).hold([change(own[0]), *own[1:]])
    with pytest.raises(ValueError, match="is not where it was"):
        look_at(own, tensors(), [change(own[0]), *own[1:]])


@pytest.mark.parametrize("data", [torch.ones(4, 4), torch.ones(3), torch.ones(4, 4).double()])
def test_a_kept_tensor_with_other_data_does_not_hold(data):
    own, buffers = tensors(), tensors()
    look, given = Look(own, own), Given(own)
    look.watch(buffers)
    assert look.find(own, tensors(), given) is not None
    buffers[0].data = data
    with pytest.raises(ValueError, match="is not where it was"):
        look.find(own, tensors(), given)


def test_found_are_the_addresses_of_tensors_that_are_alike():
    own, others = tensors(), tensors()
    assert list(look_at(own, others)) == [t.data_ptr() for t in others]
    some = [None if i % 2 else t for i, t in enumerate(others)]
    assert list(look_at(own, some)) == [0 if t is None else t.data_ptr() for t in some]
    assert list(look_at(own, [None] * len(others))) == [0] * len(others)


class Odd(torch.Tensor):
    """A type whose memory may not be its own."""


UNLIKE = {name: change for name, change in CHANGES.items() if name != "moved"} | {
    "a subclass": lambda t: t.clone().as_subclass(Odd),
    "negated": lambda t: torch._neg_view(t.clone()),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
}


@pytest.mark.parametrize("change", UNLIKE.values(), ids=UNLIKE)
def test_no_address_is_found_if_one_is_not_alike(change):
    own, others = tensors(), tensors()
    grads = [change(others[0]), *others[1:]]
    assert look_at(own, grads) is None
    assert look_at(own, [None, *others[1:]]) is not None
    with pytest.raises(ValueError, match="is not where it was"):  # a parameter beside it
        look_at(own, grads, [own[0].clone(), *own[1:]])


def test_strides_that_lead_nowhere_do_not_count():
    own = [torch.randn(1, 6), torch.randn(3, 1, 2, 2)]
    row, images = torch.randn(6, 1).t(), torch.randn(3, 1, 2, 2)
    assert row.stride() != (6, 1)
    assert look_at(own, [row, images.as_strided((3, 1, 2, 2), (4, 1, 2, 1))]) is not None


@needs_cpu_kernels
def test_unknown_placements_are_refused():
    with pytest.raises(RuntimeError, match="no record of placements has the handle 123456789"):
        torch.ops.fastfreeze.placements_look(123456789, 0, 0, [], [], 0, 0)
