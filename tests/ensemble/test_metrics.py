"""Statistics of predicted probabilities are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastfreeze.ensemble import prediction_scores


def error_rate(probabilities, labels):
    return prediction_scores(probabilities, labels).error


def nll(probabilities, labels):
    return prediction_scores(probabilities, labels).nll


def brier_score(probabilities, labels):
    return prediction_scores(probabilities, labels).brier


def expected_calibration_error(probabilities, labels, num_bins=15):
    return prediction_scores(probabilities, labels, num_bins=num_bins).ece


STATISTICS = [error_rate, nll, brier_score, expected_calibration_error]


def test_error_rate():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    assert error_rate(probabilities, torch.tensor([0, 2, 0])) == 0
    assert error_rate(probabilities, torch.tensor([0, 1, 0])) == pytest.approx(1 / 3)
    assert error_rate(probabilities, torch.tensor([1, 1, 1])) == 1


def test_nll():
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    labels = torch.tensor([0, 0], dtype=torch.int32)
    assert nll(probabilities, labels) == pytest.approx((math.log(2) + math.log(4)) / 2)
    logits = torch.randn(50, 7)
    labels = torch.randint(7, (50,))
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    assert nll(logits.softmax(-1), labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 708.4), (torch.float32, 87.3), (torch.bfloat16, 87.3), (torch.float16, 9.7)],
    ids=str,
)
def test_nll_of_an_impossible_label_is_finite(dtype, most):
    certain = torch.tensor([[0.0, 1.0]], dtype=dtype)
    assert nll(certain, torch.tensor([0])) == pytest.approx(most, abs=0.05)
    assert nll(certain, torch.tensor([1])) == 0


def test_brier_score():
    probabilities = torch.randn(33, 7, dtype=torch.float64).softmax(-1)
    labels = torch.randint(7, (33,))
    expected = sum(
        (p - (c == y)) ** 2
        for row, y in zip(probabilities.tolist(), labels.tolist(), strict=True)
        for c, p in enumerate(row)
    )
    assert brier_score(probabilities, labels) == pytest.approx(expected / 33, rel=1e-12)
    assert brier_score(torch.eye(3), torch.arange(3)) == 0
    assert brier_score(torch.eye(3), torch.tensor([1, 2, 0])) == 2


def plain_calibration_error(probabilities, labels, num_bins):
    """Equation 3, bin by bin."""
    total = 0.0
    for i in range(num_bins):
        rows = [
            (row.max().item(), row.argmax().item() == label)
            for row, label in zip(probabilities, labels.tolist(), strict=True)
            if i / num_bins < row.max() <= (i + 1) / num_bins
        ]
        if rows:
            confidence = sum(c for c, _ in rows) / len(rows)
            accuracy = sum(right for _, right in rows) / len(rows)
            total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("num_bins", [1, 2, 15, 100])
def test_expected_calibration_error(num_bins):
    probabilities = torch.randn(300, 5, dtype=torch.float64).mul(2).softmax(-1)
    labels = torch.randint(5, (300,))
    found = expected_calibration_error(probabilities, labels, num_bins)
    assert found == pytest.approx(plain_calibration_error(probabilities, labels, num_bins))


def test_expected_calibration_error_by_hand():
    probabilities = torch.tensor([[0.5, 0.5], [0.55, 0.45], [0.9, 0.1], [0.95, 0.05], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    # of 10 bins: (0.4, 0.5] right; (0.5, 0.6] wrong; (0.8, 0.9] right; (0.9, 1] half right at 0.975
    expected = (0.5 + 0.55 + 0.1 + 2 * 0.475) / 5
    found = expected_calibration_error(probabilities, labels, num_bins=10)
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_probabilities_of_any_precision_are_accepted(dtype):
    probabilities = torch.randn(20, 1000).softmax(-1)
    labels = torch.randint(1000, (20,))
    for statistic in STATISTICS:
        found = statistic(probabilities.to(dtype), labels)
        assert found == pytest.approx(statistic(probabilities, labels), abs=0.06)


GOOD = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
Y = torch.tensor([0, 1])
REFUSED_PREDICTIONS = {
    "logits": (torch.tensor([[0.5, 0.5], [2.0, 3.0]]), Y, ValueError, r"s\[1\] must sum to 1 .*5"),
    "negative": (torch.tensor([[1.5, -0.5], [1, 0]]), Y, ValueError, r"s\[0\] must be >= 0.*-0.5"),
    "nan": (torch.tensor([[0.5, 0.5], [math.nan, 1]]), Y, ValueError, r"s\[1\] must be >= 0.*nan"),
    "infinite": (torch.tensor([[math.inf, 0], [0, 1]]), Y, ValueError, r"s\[0\] must sum to 1"),
    "integers": (torch.tensor([[1, 0], [0, 1]]), Y, TypeError, "floating-point .*int64"),
    "a list": ([[0.5, 0.5]], Y, TypeError, "probabilities must be a .* tensor, got list"),
    "one dimension": (torch.tensor([1.0]), Y, ValueError, r"shape \[B, C\].*\(1,\)"),
    "one column": (torch.ones(2, 1), Y[:2], ValueError, r"C >= 2, got \(2, 1\). One column p"),
    "an array": (np.ones((2, 2)), Y[:2], TypeError, "got a NumPy array, of which torch.from_numpy"),
    "array of labels": (torch.eye(2), np.arange(2), TypeError, "labels .* NumPy array, of which"),
    "no rows": (torch.ones(0, 2), Y[:0], ValueError, r"B >= 1 and C >= 2, got \(0, 2\)"),
    "float labels": (GOOD, Y.float(), TypeError, "labels must be .*integers, got torch.float32"),
    "bool labels": (GOOD, Y.bool(), TypeError, "labels must be .*integers, got torch.bool"),
    "list of labels": (GOOD, [0, 1], TypeError, "labels must be .*integers, got list"),
    "too few labels": (GOOD, Y[:1], ValueError, r"labels must have shape \(2,\).*got \(1,\)"),
    "one-hot labels": (GOOD, torch.eye(2).long(), ValueError, r"labels must have shape \(2,\)"),
    "label too high": (GOOD, Y + 1, ValueError, r"labels\[1\] must be in 0\.\.1, got 2"),
    "label too low": (GOOD, Y - 1, ValueError, r"labels\[0\] must be in 0\.\.1, got -1"),
}


@pytest.mark.parametrize(
    ("probabilities", "labels", "error", "match"),
    REFUSED_PREDICTIONS.values(),
    ids=REFUSED_PREDICTIONS,
)
def test_refused_predictions(probabilities, labels, error, match):
    with pytest.raises(error, match=match):
        prediction_scores(probabilities, labels)


@pytest.mark.parametrize("num_bins", [0, -1, 1.5], ids=str)
def test_refused_bins(num_bins):
    with pytest.raises((TypeError, ValueError), match="num_bins must be"):
        expected_calibration_error(GOOD, Y, num_bins)
