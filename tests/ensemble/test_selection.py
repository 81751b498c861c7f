"""Greedy selection takes the best member at each step, and the curve is that of plain means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastfreeze.ensemble import last_k_curve, prediction_scores, select_members
from tests.covering import covering

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sampled(M, B, C, dtype=torch.float64, spread=1.0):
    """Members that err on different rows; some know more, and some are surer, given a spread."""
    labels = torch.randint(C, (B,))
    knows, noise = 2 * (1 - spread * torch.rand(M, 1, 1)), 1 + spread * torch.rand(M, 1, 1)
    logits = knows * torch.nn.functional.one_hot(labels, C) + noise * torch.randn(M, B, C).double()
    return logits.softmax(-1).to(dtype), labels


def plain_nll(members, labels, picks):
    """Of the mean of these members, by numpy."""
    p = np.mean([members[m].double().numpy() for m in picks], axis=0)
    y = labels.numpy()
    return -np.log(np.maximum(p[np.arange(len(y)), y], torch.finfo(members[0].dtype).tiny)).mean()


def plain_selection(members, labels):
    picks, lowest = [], math.inf
    while left := [m for m in range(len(members)) if m not in picks]:
        values = {m: plain_nll(members, labels, [*picks, m]) for m in left}
        best = min(left, key=values.get)
        if values[best] >= lowest:
            break
        picks.append(best)
        lowest = values[best]
    return tuple(picks)


@covering(shape=[(1, 1, 2), (2, 31, 2), (5, 32, 7), (7, 33, 3)], dtype=DTYPES)
def test_each_pick_is_the_best(dtype, shape):
    for _ in range(3):
        members, labels = sampled(*shape, dtype)
        assert select_members(members, labels) == plain_selection(members, labels)


def test_by_hand():
    """The first errs on one row, the second makes up for it, the third does not help."""
    of_label = torch.tensor([[0.8, 0.4], [0.3, 0.9], [0.2, 0.2]])
    members = torch.stack([of_label, 1 - of_label], -1)
    labels = torch.tensor([0, 0])
    assert select_members(members, labels) == (0, 1)
    assert select_members(members[:1].expand(4, -1, -1), labels) == (0,)  # the first of equal ones


def test_a_list_is_as_a_tensor_and_nothing_is_written():
    members, labels = sampled(4, 33, 5, torch.float32)
    before = members.clone()
    strided = [m.t().contiguous().t().requires_grad_() for m in members]
    assert select_members(strided, labels.int()) == select_members(members, labels)
    assert last_k_curve(strided, labels) == last_k_curve(members, labels)
    assert torch.equal(members, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_impossible_label_is_finite(dtype):
    """Its floor is that of the members' dtype, as in nll."""
    members = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]], dtype=dtype)
    label = torch.tensor([0])
    assert select_members(members, label) == (0,)
    assert last_k_curve(members, label) == (prediction_scores(members[0], label).nll,) * 2


@covering(dtype=DTYPES, M=[1, 2, 6])
def test_last_k_curve(dtype, M):
    members, labels = sampled(M, 33, 5, dtype)
    found = last_k_curve(members, labels)
    expected = [plain_nll(members, labels, range(M - k, M)) for k in range(1, M + 1)]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("call", [select_members, last_k_curve], ids=lambda f: f.__name__)
def test_bad_arguments(call):
    members, labels = sampled(2, 4, 5)
    a, b = members
    for given, y, error, match in [
        (a, labels, ValueError, r"members must have shape \[M, B, C\], got \(4, 5\)"),
        ([], labels, ValueError, "members must hold at least one member, got none"),
        (members[:0], labels, ValueError, "members must hold at least one member, got none"),
        (members, torch.tensor([0, 1, 5, 2]), ValueError, r"labels\[2\] must be in 0\.\.4, got 5"),
        ([a, b.long()], labels, TypeError, r"members\[1\] must be a floating-point .*\.int64"),
        ([a, b + 0.3], labels, ValueError, r"members\[1\]\[0\] must sum to 1 .* got 2\.5"),
        ([a, b[:, :2].softmax(-1)], labels % 2, ValueError, r"members\[1\] must be like the first"),
    ]:
        with pytest.raises(error, match=match):
            call(given, y)
