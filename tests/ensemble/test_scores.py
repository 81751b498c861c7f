"""Scores of predicted probabilities are right, of all rows at once and in one pass over batches."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fastfreeze.ensemble import SnapshotEnsemble, evaluate, prediction_scores
from tests.covering import covering

TINY = {torch.float64: 708.4, torch.float32: 87.3, torch.bfloat16: 87.3, torch.float16: 9.7}


class Given:
    """An ensemble whose inputs are its members' probabilities, [B, M, C]."""

    def member_probabilities(self, inputs):
        yield from inputs.unbind(1)


def in_batches(probabilities, labels, sizes):
    return zip(probabilities.split(sizes), labels.split(sizes), strict=True)


def exact_probabilities(rows, members, classes):
    """Multiples of 1/64, which every dtype holds."""
    chances = torch.randn(rows * members, classes).mul(2).softmax(-1)
    chosen = torch.multinomial(chances, 64 - classes, replacement=True)
    counts = nn.functional.one_hot(chosen, classes).sum(1) + 1
    return counts.double().div(64).unflatten(0, (rows, members))


def plain_scores(probabilities, labels, num_bins):
    """Row by row; of the calibration error (eq. 3) bin by bin."""
    rows = list(zip(probabilities.double().tolist(), labels.tolist(), strict=True))
    confident = [(max(p), p.index(max(p)) == y) for p, y in rows]
    ece = 0.0
    for i in range(num_bins):
        of_bin = [(c, ok) for c, ok in confident if i / num_bins < c <= (i + 1) / num_bins]
        ece += abs(sum(ok - c for c, ok in of_bin)) / len(rows)
    brier = sum((x - (c == y)) ** 2 for p, y in rows for c, x in enumerate(p))
    return {
        "error": sum(not ok for _, ok in confident) / len(rows),
        "nll": -sum(math.log(p[y]) for p, y in rows) / len(rows),
        "brier": brier / len(rows),
        "ece": ece,
        "entropy": -sum(x * math.log(x) for p, _ in rows for x in p) / len(rows),
    }


@covering(
    dtype=list(TINY), members=[1, 3], sizes=[[1], [33], [1, 31, 32, 33]], num_bins=[1, 2, 7, 100]
)
def test_they_are_those_of_the_rows(dtype, members, sizes, num_bins):
    rows = sum(sizes)
    given = exact_probabilities(rows, members, 4).to(dtype)
    labels = torch.randint(4, (rows,), dtype=torch.int32)
    found = evaluate(Given(), in_batches(given, labels, sizes), num_bins=num_bins)
    close = {"rel": 1e-12, "abs": 1e-12}
    for scores, p in zip(found.members, given.unbind(1), strict=True):
        expected = pytest.approx(plain_scores(p, labels, num_bins), **close)
        assert dataclasses.asdict(scores) == expected
        assert dataclasses.asdict(prediction_scores(p, labels, num_bins=num_bins)) == expected
    p = given.double()
    mean = plain_scores(p.mean(1), labels, num_bins)
    assert dataclasses.asdict(found.ensemble) == pytest.approx(mean, **close)
    own = sum(scores.entropy for scores in found.members) / members
    assert found.mutual_information == pytest.approx(mean["entropy"] - own, **close)
    classes = given.argmax(-1).T
    differing = [[(a != b).double().mean().item() for b in classes] for a in classes]
    assert found.disagreement == tuple(map(tuple, differing))
    assert (found.num_rows, found.num_bins) == (rows, num_bins)


def test_scores_by_hand():
    probabilities = torch.tensor([[0.5, 0.5], [0.55, 0.45], [0.9, 0.1], [0.95, 0.05], [0.0, 1.0]])
    found = prediction_scores(probabilities, torch.tensor([0, 1, 0, 1, 1]), num_bins=10)
    # of 10 bins: (0.4, 0.5] right; (0.5, 0.6] wrong; (0.8, 0.9] right; (0.9, 1] half right at 0.975
    assert found.ece == pytest.approx((0.5 + 0.55 + 0.1 + 2 * 0.475) / 5, rel=1e-6)
    assert found.error == 0.4  # the first if tied
    sure = prediction_scores(torch.eye(3), torch.arange(3))
    assert (sure.error, sure.nll, sure.brier, sure.ece, sure.entropy) == (0, 0, 0, 0, 0)
    assert prediction_scores(torch.eye(3), torch.tensor([1, 2, 0])).brier == 2


@pytest.mark.parametrize(("dtype", "most"), TINY.items(), ids=str)
def test_the_nll_of_an_impossible_label_is_finite(dtype, most):
    """Its floor is that of the members' dtype, of the ensemble too."""
    certain = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=dtype)
    found = evaluate(Given(), [(certain, torch.tensor([0]))])
    assert found.ensemble.nll == found.members[0].nll == pytest.approx(most, abs=0.05)


def test_probabilities_of_any_precision_are_accepted():
    probabilities, labels = torch.randn(20, 1000).softmax(-1), torch.randint(1000, (20,))
    expected = dataclasses.asdict(prediction_scores(probabilities, labels))
    for dtype in (torch.float16, torch.bfloat16):
        found = dataclasses.asdict(prediction_scores(probabilities.to(dtype), labels))
        assert found == pytest.approx(expected, abs=0.06)


def test_an_evaluation_by_hand():
    """Two members, both sure; they differ on one of two rows, where the ensemble knows nothing."""
    given = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = evaluate(Given(), [(given, torch.tensor([0, 0]))])
    half, tiny = math.log(2) / 2, math.log(torch.finfo(torch.float32).tiny)
    expected = {
        "members": (
            {"error": 0, "nll": 0, "brier": 0, "ece": 0, "entropy": 0},
            {"error": 0.5, "nll": pytest.approx(-tiny / 2), "brier": 1, "ece": 0.5, "entropy": 0},
        ),
        "ensemble": {  # the first class if tied
            **{"error": 0, "brier": 0.25, "ece": 0.25},
            **{"nll": pytest.approx(half), "entropy": pytest.approx(half)},
        },
        "mutual_information": pytest.approx(half),
        "disagreement": ((0, 0.5), (0.5, 0)),
        **{"num_rows": 2, "num_bins": 15},
    }
    assert dataclasses.asdict(found) == expected
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    table = """\
          error %      NLL   Brier     ECE  entropy
---------------------------------------------------
member 0     0.00   0.0000  0.0000  0.0000   0.0000
member 1    50.00  43.6683  1.0000  0.5000   0.0000
ensemble     0.00   0.3466  0.2500  0.2500   0.3466

2 rows; two members differ on 50.00% of them; mutual information 0.3466 nats"""
    assert str(found) == table


def test_mutual_information_is_never_negative():
    """Members that agree have none, but for rounding."""
    for row in torch.randn(100, 1, 4, dtype=torch.float64).softmax(-1):
        found = evaluate(Given(), [(row.expand(1, 3, 4), torch.tensor([0]))])
        assert 0 <= found.mutual_information < 1e-14


def test_a_default_device_changes_nothing():
    given, labels = exact_probabilities(16, 3, 4), torch.randint(4, (16,))
    expected = evaluate(Given(), in_batches(given, labels, [7, 9]))
    with torch.device("meta"):
        assert evaluate(Given(), in_batches(given, labels, [7, 9])) == expected
        assert prediction_scores(given.mean(1), labels) == expected.ensemble


def test_one_pass_that_keeps_no_predictions():
    seen = []

    class Watched:
        def member_probabilities(self, inputs):
            assert not torch.is_grad_enabled()
            for batch in seen[:-1]:  # the latest may still have a name
                assert all(reference() is None for reference in batch)
            members = [inputs.softmax(-1), inputs.flip(-1).softmax(-1)]
            seen.append([weakref.ref(p) for p in members])
            return members

    batches = iter([(torch.randn(4, 3), torch.randint(3, (4,))) for _ in range(5)])
    assert evaluate(Watched(), batches).num_rows == 20
    assert len(seen) == 5


def test_batches_by_position_and_by_name():
    """As a tokenizer's and a Trainer's collator give them, for models that return such outputs."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, values, mask=None):
            return {"loss": None, "logits": self.linear(values if mask is None else values * mask)}

    ensemble = SnapshotEnsemble(Named(), [Named().state_dict() for _ in range(3)])
    x, mask, y = torch.randn(7, 3), torch.randint(2, (7, 3)), torch.randint(4, (7,))
    given = torch.stack(list(ensemble.member_probabilities(x, mask)), 1)
    expected = evaluate(Given(), [(given, y)])
    named = {"values": x, "mask": mask}
    for batch in ({**named, "labels": y}, (named, y), ((x, mask), y), [[x, mask], y]):
        assert evaluate(ensemble, [batch]) == expected
    with pytest.raises(TypeError, match=r"batches must give .* got a dict of 'values', 'mask'"):
        evaluate(ensemble, [named])


HALF, GOOD, Y = torch.full((2, 2, 2), 0.5), torch.full((2, 2), 0.5), torch.tensor([0, 1])
REFUSED = {
    "no batch": ([], ValueError, "batches must give at least one batch, got none"),
    "no labels": ([HALF], TypeError, r"pairs \(inputs, labels\), or .* got a Tensor"),
    "a triple": ([(HALF, Y, Y)], TypeError, r"pairs \(inputs, labels\), or .* got a tuple of 3"),
    "an array": ([(HALF.numpy(), Y)], TypeError, r"batches\[0\] must hold tensors, got a NumPy"),
    "labels in an array": ([(HALF, Y), (HALF, Y.numpy())], TypeError, r"batches\[1\] .*from_numpy"),
    "no members": ([(HALF[:, :0], Y)], ValueError, "at least one: expected 1, got 0"),
    "fewer members": ([(HALF, Y), (HALF[:, :1], Y)], ValueError, "same members .* 2, got 1"),
    "logits": ([(HALF * torch.tensor([[1.0], [2]]), Y)], ValueError, r"members\[1\]\[0\] must su"),
}


@pytest.mark.parametrize(("batches", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_evaluations(batches, error, match):
    with pytest.raises(error, match=match):
        evaluate(Given(), batches)


REFUSED_PREDICTIONS = {
    "logits": (torch.tensor([[0.5, 0.5], [2.0, 3.0]]), Y, ValueError, r"s\[1\] must sum to 1 .*5"),
    "negative": (torch.tensor([[1.5, -0.5], [1, 0]]), Y, ValueError, r"s\[0\] must be >= 0.*-0.5"),
    "nan": (torch.tensor([[0.5, 0.5], [math.nan, 1]]), Y, ValueError, r"s\[1\] must be >= 0.*nan"),
    "infinite": (torch.tensor([[math.inf, 0], [0, 1]]), Y, ValueError, r"s\[0\] must sum to 1"),
    "integers": (torch.tensor([[1, 0], [0, 1]]), Y, TypeError, "floating-point .*int64"),
    "one dimension": (torch.tensor([1.0]), Y, ValueError, r"shape \[B, C\].*\(1,\)"),
    "one column": (torch.ones(2, 1), Y[:2], ValueError, r"C >= 2, got \(2, 1\). One column p"),
    "an array": (np.ones((2, 2)), Y[:2], TypeError, "got a NumPy array, of which torch.from_numpy"),
    "array of labels": (torch.eye(2), np.arange(2), TypeError, "labels .* NumPy array, of which"),
    "no rows": (torch.ones(0, 2), Y[:0], ValueError, r"B >= 1 and C >= 2, got \(0, 2\)"),
    "float labels": (GOOD, Y.float(), TypeError, "labels must be .*integers, got torch.float32"),
    "bool labels": (GOOD, Y.bool(), TypeError, "labels must be .*integers, got torch.bool"),
    "list of labels": (GOOD, [0, 1], TypeError, "labels must be .*integers, got list"),
    "one-hot labels": (GOOD, torch.eye(2).long(), ValueError, r"labels must have shape \(2,\)"),
    "label too high": (GOOD, Y + 1, ValueError, r"labels\[1\] must be in 0\.\.1, got 2"),
    "label too low": (GOOD, Y - 1, ValueError, r"labels\[0\] must be in 0\.\.1, got -1"),
}


@pytest.mark.parametrize("row", REFUSED_PREDICTIONS.values(), ids=REFUSED_PREDICTIONS)
def test_refused_predictions(row):
    probabilities, labels, error, match = row
    with pytest.raises(error, match=match):
        prediction_scores(probabilities, labels)


def test_refused_bins():
    for bins, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"num_bins must be .* got {bins}"):
            prediction_scores(GOOD, Y, num_bins=bins)
        with pytest.raises(error, match="num_bins must be"):  # before anything runs
            evaluate(Given(), iter(lambda: 1 / 0, None), num_bins=bins)
