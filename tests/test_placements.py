"""Placements: what is seen of tensors that have moved or changed, in C++ and in Python."""

from __future__ import annotations

import pytest
import torch

from fastfreeze.ops import _placements
from fastfreeze.ops._placements import KeptPlacements, Placements
from tests.conftest import needs_cpu_kernels


@pytest.fixture(
    autouse=True,
    params=[pytest.param(True, marks=needs_cpu_kernels), False],
    ids=["C++", "Python"],
)
def _compiled_or_not(request, monkeypatch):
    monkeypatch.setattr(_placements, "_has_library", lambda: request.param)


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


def as_strided(t):
    return t.as_strided((4, 4), (1, 4))


CHANGES = {
    "moved": lambda t: t.clone(),
    "transposed": as_strided,
    "another dtype": lambda t: t.view(torch.int32),
    "reshaped": lambda t: t.view(2, 8),
    "flattened": lambda t: t.view(16),
    "fewer rows": lambda t: t[:3],
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("kind", [Placements, KeptPlacements])
def test_the_same_tensors_hold(kind):
    own = tensors()
    placements = kind(own)
    assert placements.hold(own)
    assert placements.hold([t.detach() for t in own]) == (kind is Placements)
    assert not placements.hold(own[:-1])
    assert not placements.hold([*own, own[0]])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tensor_does_not_hold(change):
    own = tensors()
    placements = Placements(own)
    assert not placements.hold([change(own[0]), *own[1:]])


@pytest.mark.parametrize("data", [torch.ones(4, 4), torch.ones(3), torch.ones(4, 4).double()])
def test_a_kept_tensor_with_other_data_does_not_hold(data):
    own = tensors()
    placements = KeptPlacements(own)
    own[0].data = data
    assert not placements.hold(own)


def test_gathered_are_the_addresses_of_tensors_that_are_alike():
    placements, others = Placements(tensors()), tensors()
    assert list(placements.gather(others)) == [t.data_ptr() for t in others]
    some = [None if i % 2 else t for i, t in enumerate(others)]
    assert list(placements.gather(some)) == [0 if t is None else t.data_ptr() for t in some]
    assert list(placements.gather([None] * len(others))) == [0] * len(others)


@pytest.mark.parametrize("change", [n for n in CHANGES if n != "moved"])
def test_none_is_gathered_if_one_is_not_alike(change):
    placements, others = Placements(tensors()), tensors()
    assert placements.gather([CHANGES[change](others[0]), *others[1:]]) is None
    assert placements.gather([None, *others[1:]]) is not None


def test_strides_that_lead_nowhere_do_not_count():
    placements = Placements([torch.randn(1, 6), torch.randn(3, 1, 2, 2)])
    row, images = torch.randn(6, 1).t(), torch.randn(3, 1, 2, 2)
    assert row.stride() != (6, 1)
    assert placements.gather([row, images.as_strided((3, 1, 2, 2), (4, 1, 2, 1))]) is not None


def test_zeros_without_memory_are_not_gathered():
    placements = Placements([torch.ones(3)])
    assert placements.gather([torch._efficientzerotensor(3)]) is None


@needs_cpu_kernels
def test_unknown_placements_are_refused():
    with pytest.raises(RuntimeError, match="no record of placements has the handle 123456789"):
        torch.ops.fastfreeze.placements_hold(123456789, [])
