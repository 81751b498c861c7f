"""Which tensors share memory, and which gradients lie in what a step writes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastfreeze.kernels.memory import Gaps, sharing, stretch_of
from fastfreeze.kernels.placements import Given, Look

FLAT = torch.randn(100)
ROWS = {
    "apart": ([[FLAT[:10]], [FLAT[10:20]], [FLAT[90:]]], set()),
    "the same": ([[FLAT[:10]], [FLAT[:10]]], {0, 1}),
    "a part of another": ([[FLAT[:10]], [FLAT[50:60]], [FLAT]], {0, 1, 2}),
    "by one element": ([[FLAT[:10]], [FLAT[9:20]], [FLAT[20:]]], {0, 1}),
    "two in a third's end": ([[FLAT[:50]], [FLAT[10:20]], [FLAT[45:60]], [FLAT[60:]]], {0, 1, 2}),
    "between its elements": ([[FLAT[:20:2]], [FLAT[1:20:2]]], {0, 1}),
    "with its own": ([[FLAT[:10], FLAT[5:15]], [FLAT[20:]]], {0}),
    "by the second": ([[FLAT[:10], FLAT[50:60]], [FLAT[10:20], FLAT[55:65]]], {0, 1}),
    "by one of another dtype": ([[FLAT[:10]], [FLAT.view(torch.int16)[19:21]]], {0, 1}),
    "without elements": ([[FLAT], [FLAT[5:5]]], set()),
    "without memory": ([[torch._efficientzerotensor(3), None], [FLAT.to_sparse()], [FLAT]], set()),
    "on no device": ([[torch.empty(3, device="meta")], [torch.empty(3, device="meta")]], set()),
}


@pytest.mark.parametrize(("members", "expected"), ROWS.values(), ids=ROWS)
def test_sharing(members, expected):
    assert sharing(members) == expected


def test_a_stretch_reaches_from_the_first_element_to_the_last():
    begin = FLAT.data_ptr()
    assert stretch_of(FLAT[10:20:3]) == (begin + 40, begin + 80)
    assert stretch_of(FLAT.view(10, 10).t()[2:4]) == (begin + 8, begin + 4 * 94)


def test_gaps_agree_with_every_pair():
    generator = torch.Generator().manual_seed(0)

    def cuts(count):
        begins = torch.randint(0, 90, (count,), generator=generator).tolist()
        sizes = torch.randint(0, 8, (count,), generator=generator).tolist()
        return [FLAT[b : b + n] for b, n in zip(begins, sizes, strict=True)]

    params = [torch.empty(n) for n in (0, 1, 4)]
    for at in range(600):
        if at % 30 == 0:
            written = cuts(3)
            gaps, look = Gaps(written), Look(params, written)
        begins = torch.randint(0, 90, (3,), generator=generator).tolist()
        grads = [FLAT[b : b + p.numel()] for b, p in zip(begins, params, strict=True)]
        apart = all(not sharing([[w], [g]]) for w in written for g in grads)
        assert gaps.hold(grads) == apart
        with contextlib.nullcontext() if apart else pytest.raises(ValueError, match="memory of"):
            assert look.find(params, grads, Given(grads)) is not None
        assert gaps.hold([None, *grads[1:]]) == all(
            not sharing([[w], [g]]) for w in written for g in grads[1:]
        )
