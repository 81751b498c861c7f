"""Greedy selection takes the best member at each step, and the curve is that of plain means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastfreeze.ensemble.scores import error_rate, nll
from fastfreeze.ensemble.selection import Selection, last_k_curve, select_members
from tests.covering import covering

METRICS = {"nll": nll, "error": error_rate}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_metric = pytest.mark.parametrize("metric", METRICS)


def sampled(M, B, C, dtype=torch.float64, spread=1.0):
    """Members that err on different rows; some know more, and some are surer, given a spread."""
    labels = torch.randint(C, (B,))
    knows, noise = 2 * (1 - spread * torch.rand(M, 1, 1)), 1 + spread * torch.rand(M, 1, 1)
    logits = knows * torch.nn.functional.one_hot(labels, C) + noise * torch.randn(M, B, C).double()
    return logits.softmax(-1).to(dtype), labels


def plain_value(members, labels, picks, metric):
    """(metric, NLL) of the mean of these members, by numpy."""
    p = np.mean([members[m].double().numpy() for m in picks], axis=0)
    y = labels.numpy()
    of_label = np.maximum(p[np.arange(len(y)), y], torch.finfo(members[0].dtype).tiny)
    found = -np.log(of_label).mean()
    return (np.mean(p.argmax(-1) != y), found) if metric == "error" else (found,)


def plain_selection(members, labels, metric, replace, limit):
    picks, path = [], []
    while len(picks) < limit:
        left = [m for m in range(len(members)) if replace or m not in picks]
        if not left:
            break
        values = {m: plain_value(members, labels, [*picks, m], metric) for m in left}
        best = min(left, key=values.get)
        if path and values[best] >= path[-1]:
            break
        picks.append(best)
        path.append(values[best])
    return picks, [value[0] for value in path]


@covering(
    shape=[(1, 1, 2), (2, 31, 2), (5, 32, 7), (7, 33, 3)],
    dtype=DTYPES,
    metric=list(METRICS),
    replace={"once": False, "again": True},
)
def test_each_pick_is_the_best(metric, replace, dtype, shape):
    M, B, C = shape
    for _ in range(3):
        members, labels = sampled(M, B, C, dtype)
        found = select_members(members, labels, replace=replace, metric=metric)
        limit = 1000 if replace else M
        picks, path = plain_selection(members, labels, metric, replace, limit)
        assert list(found.picks) == picks
        assert found.path == pytest.approx(path, rel=1e-12)
        assert found.single == tuple(METRICS[metric](p, labels) for p in members)


@every_metric
def test_all_subsets(metric):
    """Never worse than the best single member, nor better than the best of all subsets."""
    for _ in range(20):
        members, labels = sampled(5, 40, 4)
        found = select_members(members, labels, metric=metric)
        best = min(
            plain_value(members, labels, subset, metric)[0]
            for size in range(1, 6)
            for subset in itertools.combinations(range(5), size)
        )
        value = found.path[-1]
        assert best - 1e-12 <= value <= min(found.single)
        assert value == pytest.approx(METRICS[metric](members[list(found.picks)].mean(0), labels))
        assert found.path[0] == min(found.single)
        assert list(found.path) == sorted(found.path, reverse=True)
        assert len(set(found.picks)) == len(found.picks)


def test_by_hand():
    """The first errs on one row, the two others make up for it together."""
    label = torch.tensor([0, 0])
    of_label = torch.tensor([[0.8, 0.4], [0.3, 0.9], [0.2, 0.2]])
    members = torch.stack([of_label, 1 - of_label], -1)
    found = select_members(members, label)
    assert found.picks == found.indices == (0, 1)
    expected = [-(math.log(a) + math.log(b)) / 2 for a, b in ((0.8, 0.4), (0.55, 0.65))]
    assert found.path == pytest.approx(expected, rel=1e-6)
    errors = select_members(members, label, metric="error")
    assert (errors.single, errors.path, errors.picks) == ((0.5, 0.5, 1.0), (0.5, 0.0), (0, 1))
    # The error leaves ties to the NLL.
    of_label = torch.tensor([[0.6, 0.6], [0.9, 0.9], [0.1, 0.9]])
    members = torch.stack([of_label, 1 - of_label], -1)
    found = select_members(members, label, metric="error")
    assert (found.picks, found.path) == ((1,), (0.0,))
    found = Selection((2, 0, 2, 2, 1), (1.0,) * 5, (1.0,) * 3)
    assert (found.indices, found.counts, found.weights) == ((2, 0, 1), (3, 1, 1), (0.6, 0.2, 0.2))


def test_replacement_by_hand():
    """The first member's best share is 2/3, where both rows are as likely: 0.4 + 0.2, 0.8 - 0.2."""
    of_label = torch.tensor([[0.7, 0.5], [0.4, 0.8]], dtype=torch.float64)
    members = torch.stack([of_label, 1 - of_label], -1)
    found = select_members(members, torch.tensor([0, 0]), replace=True, max_members=40)
    assert found.picks == (0, 1, 0)
    assert found.indices == (0, 1)
    assert found.weights == pytest.approx((2 / 3, 1 / 3))
    expected = [-math.log(a * b) / 2 for a, b in ((0.7, 0.5), (0.55, 0.65), (0.6, 0.6))]
    assert found.path == pytest.approx(expected, rel=1e-12)


@every_metric
@pytest.mark.parametrize("replace", [False, True])
def test_ties_go_to_the_first(metric, replace):
    members, labels = sampled(1, 33, 4)
    found = select_members(members.expand(4, -1, -1), labels, metric=metric, replace=replace)
    assert found.picks == (0,)
    other, _ = sampled(1, 33, 4)
    twice = torch.cat([other, members, members, other])
    found = select_members(twice, labels, metric=metric)
    assert found.picks == tuple(plain_selection(twice, labels, metric, False, 4)[0])
    assert found.picks[0] in (0, 1)


def test_max_members():
    members, labels = sampled(6, 200, 5, spread=0.1)
    whole = select_members(members, labels)
    assert len(whole.picks) > 2
    for count in range(1, len(whole.picks) + 3):
        found = select_members(members, labels, max_members=count)
        assert found.picks == whole.picks[:count]
        assert found.path == whole.path[:count]
        assert found.single == whole.single
    for count, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"max_members must be .* got {count}"):
            select_members(members, labels, max_members=count)


@every_metric
def test_a_list_is_as_a_tensor_and_nothing_is_written(metric):
    members, labels = sampled(4, 33, 5, torch.float32)
    before = members.clone()
    strided = [m.t().contiguous().t().requires_grad_() for m in members]
    found = select_members(strided, labels.int(), metric=metric)
    assert found == select_members(members, labels, metric=metric)
    assert last_k_curve(strided, labels, metric=metric) == last_k_curve(
        members, labels, metric=metric
    )
    assert torch.equal(members, before)
    assert isinstance(found.path[0], float)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_impossible_label_is_finite(dtype):
    members = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]], dtype=dtype)
    label = torch.tensor([0])
    assert select_members(members, label).path == (nll(members[0], label),)
    assert last_k_curve(members, label) == (nll(members[0], label),) * 2


@covering(metric=list(METRICS), dtype=DTYPES, M=[1, 2, 6])
def test_last_k_curve(metric, dtype, M):
    members, labels = sampled(M, 33, 5, dtype)
    found = last_k_curve(members, labels, metric=metric)
    expected = [plain_value(members, labels, range(M - k, M), metric)[0] for k in range(1, M + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == METRICS[metric](members[-1], labels)


@pytest.mark.parametrize("call", [select_members, last_k_curve], ids=lambda f: f.__name__)
def test_bad_arguments(call):
    members, labels = sampled(3, 4, 5)
    first = members[0]
    for arguments, options, error, match in (
        ((first, labels), {}, ValueError, r"members must have shape \[M, B, C\], got \(4, 5\)"),
        (([], labels), {}, ValueError, "members must hold at least one member, got none"),
        ((members[:0], labels), {}, ValueError, "members must hold at least one member, got none"),
        ((members[:, :0], labels[:0]), {}, ValueError, r"members\[0\] must have shape \[B, C\]"),
        (([first, labels], labels), {}, TypeError, r"members\[1\] must be a fl.* torch\.int64"),
        ((members, labels[:3]), {}, ValueError, r"labels must have shape \(4,\) on cpu, got \(3,"),
        ((members, labels * 0 + 5), {}, ValueError, r"labels\[0\] must be in 0\.\.4, got 5"),
        (([first, first * 0 + 0.5], labels), {}, ValueError, r"\[1\]\[0\] must sum .* 2\.5"),
        (([first, first * torch.nan], labels), {}, ValueError, r"\[1\]\[0\] must be >= 0, got nan"),
        (([first, torch.full((4, 2), 0.5)], labels * 0), {}, ValueError, "be like the first"),
        ((members, labels), {"metric": "ece"}, ValueError, r"metric must be one of .* got 'ece'"),
    ):
        with pytest.raises(error, match=match):
            call(*arguments, **options)
