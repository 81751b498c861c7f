"""The fitted temperature is the one of the lowest NLL, whatever the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import calibrate
from fastfreeze.ensemble.calibrate import TemperatureScaling, fit_temperature
from fastfreeze.ensemble.scores import prediction_scores
from tests.covering import covering

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def searched_temperature(logits, labels):
    """By ternary search of the NLL over log T."""
    low, high = math.log(0.01), math.log(100)
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        of_a, of_b = (
            nn.functional.cross_entropy(logits.double() / math.exp(x), labels).item()
            for x in (a, b)
        )
        low, high = (low, b) if of_a <= of_b else (a, high)
    return math.exp((low + high) / 2)


def sampled(rows, classes, temperature, dtype=torch.float64):
    """Logits, and labels that they predict at a temperature."""
    logits = torch.randn(rows, classes, dtype=torch.float64).mul(3).to(dtype)
    chances = logits.double().div(temperature).softmax(-1)
    return logits, torch.multinomial(chances, 1).squeeze(-1)


@covering(
    dtype=DTYPES,
    sizes=[(31, 2), (32, 7), (33, 33), (500, 10)],
    temperature=[0.3, 1.0, 4.0],
)
def test_it_is_the_lowest_nll(dtype, sizes, temperature, monkeypatch):
    logits, labels = sampled(*sizes, temperature, dtype)
    calls, derivatives = [], calibrate._derivatives
    counted = lambda *args: calls.append(0) or derivatives(*args)  # noqa: E731
    monkeypatch.setattr(calibrate, "_derivatives", counted)
    found = fit_temperature(logits, labels)
    assert len(calls) <= 20
    assert found == pytest.approx(searched_temperature(logits, labels), rel=1e-5)
    assert found == fit_temperature(logits.double(), labels)


@pytest.mark.parametrize("gap", [1e-2, 2.0, 650.0])
@pytest.mark.parametrize("wrong", [1, 10, 400])
def test_two_classes_by_hand(gap, wrong):
    """The probability of the first is the share of rows that it is right in."""
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64).expand(1000, 2)
    labels = (torch.arange(1000) < wrong).long()
    expected = gap / math.log((1000 - wrong) / wrong)
    assert fit_temperature(logits, labels) == pytest.approx(min(100, max(0.01, expected)), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.0101, 0.02, 50.0, 99.9])
@pytest.mark.parametrize("block", [1, 15, 10_000])
def test_close_to_the_bounds_and_in_blocks(temperature, block, monkeypatch):
    logits, labels = sampled(200, 5, 1.0)
    logits = logits * temperature / fit_temperature(logits, labels)
    monkeypatch.setattr(calibrate, "_BLOCK", block)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=1e-8)


LABELS = torch.tensor([0, 1, 2])
SEPARABLE = torch.eye(3, dtype=torch.float64)
BOUNDED = {
    "separable": (SEPARABLE, LABELS, 0.01),
    "separable by far": (1000 * SEPARABLE, LABELS, 0.01),
    "one row, right": (torch.tensor([[2.0, 1.0]]), torch.tensor([0]), 0.01),
    "one row, wrong": (torch.tensor([[2.0, 1.0]]), torch.tensor([1]), 100.0),
    "all wrong": (SEPARABLE, torch.tensor([1, 2, 0]), 100.0),
    "all wrong, extreme": (1e300 * SEPARABLE, torch.tensor([1, 2, 0]), 100.0),
    "half wrong": (torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]), 100.0),
    "uniform": (torch.full((3, 4), 7.0), LABELS, 1.0),
    "uniform where not masked": (torch.tensor([[0.5, 0.5, -math.inf]]), LABELS[:1], 1.0),
    "tied for the highest": (torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]), 0.01),
}


@pytest.mark.parametrize(("logits", "labels", "expected"), BOUNDED.values(), ids=BOUNDED)
def test_where_there_is_no_minimum_within(logits, labels, expected):
    assert fit_temperature(logits, labels) == expected


def test_only_differences_of_logits_count():
    logits, labels = sampled(50, 4, 2.0)
    expected = pytest.approx(fit_temperature(logits, labels), rel=1e-9)
    assert fit_temperature(logits.log_softmax(-1), labels) == expected
    assert fit_temperature(logits + 1000 * torch.randn(50, 1).double(), labels) == expected
    masked = torch.cat([logits, torch.full((50, 3), -math.inf)], dim=1)
    assert fit_temperature(masked, labels) == expected


GOOD, Y, INF = torch.zeros(2, 2), torch.tensor([0, 1]), math.inf


def second_row(*values):
    return torch.tensor([[0.0, 0.0], values])


REFUSED = {
    "integers": (GOOD.long(), Y, TypeError, "logits must be a floating-point .*int64"),
    "nan": (second_row(0.0, math.nan), Y, ValueError, r"logits\[1\] .*got nan"),
    "inf": (second_row(0.0, INF), Y, ValueError, r"logits\[1\] .*got inf"),
    "all masked": (second_row(-INF, -INF), Y, ValueError, r"logits\[1\] .*-inf"),
    "masked label": (second_row(0, -INF), Y, ValueError, r"finite at the label"),
    "label too high": (GOOD, Y + 1, ValueError, r"labels\[1\] must be in 0\.\.1, got 2"),
}


@pytest.mark.parametrize(("logits", "labels", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(logits, labels, error, match):
    with pytest.raises(error, match=match):
        fit_temperature(logits, labels)


def test_scaling_lowers_the_nll_of_other_data():
    logits, labels = sampled(2000, 5, 3.0)
    probabilities = logits.softmax(-1)
    scaling = TemperatureScaling().fit(probabilities[:1000], labels[:1000])
    expected = fit_temperature(logits[:1000], labels[:1000])
    assert scaling.temperature.item() == pytest.approx(expected, rel=1e-6)
    scaled, others = scaling(probabilities[1000:]), labels[1000:]
    before = prediction_scores(probabilities[1000:], others)
    assert prediction_scores(scaled, others).nll < before.nll - 0.1
    assert torch.equal(scaled.argmax(-1), probabilities[1000:].argmax(-1))


TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@covering(
    dtype=DTYPES,
    temperature=[0.05, 0.5, 1.0, 8.0],
    shape=[(0, 3), (1, 2), (31, 33), (2, 3, 5), (7,)],
)
def test_forward(dtype, temperature, shape):
    probabilities = torch.rand(shape, dtype=torch.float64).add(0.01)
    probabilities = (probabilities / probabilities.sum(-1, keepdim=True)).to(dtype)
    scaling = TemperatureScaling()
    scaling.temperature.fill_(temperature)
    power = probabilities.double() ** (1 / scaling.temperature.double())
    expected = power / power.sum(-1, keepdim=True)
    close = {"rtol": TOLERANCE[dtype], "atol": 1e-7, "check_dtype": False}
    found = scaling(probabilities)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fit_with_a_label_of_probability_0(dtype):
    """It counts as the smallest normal number; classes that are no label stay impossible."""
    probabilities, labels = torch.tensor([[0.75, 0.25, 0.0]] * 4), torch.tensor([0, 0, 0, 2])
    logits = probabilities.double()
    logits[3, 2] = torch.finfo(dtype).tiny
    expected = searched_temperature(logits.log(), labels)
    found = TemperatureScaling().fit(probabilities.to(dtype), labels).temperature.item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_state_is_saved_and_loaded_and_kept_where_a_fit_fails():
    scaling, half = TemperatureScaling(), torch.tensor([[0.5, 0.5]])
    scaling.fit(torch.tensor([[0.9, 0.1]] * 4), torch.tensor([0, 1, 0, 0]))
    assert str(scaling) == "TemperatureScaling(temperature=2)"  # log 9 / log 3
    assert not list(scaling.parameters())
    for probabilities, labels in ((half + 0.1, Y[:1]), (half, Y[:1] + 2), (half[:0], Y[:0])):
        with pytest.raises(ValueError, match=r"probabilities|labels"):
            scaling.fit(probabilities, labels)
    other = TemperatureScaling()
    other.load_state_dict(scaling.state_dict())
    assert other.temperature == pytest.approx(2)


def test_forward_along_another_dimension():
    scaling, p = TemperatureScaling(), torch.rand(2, 5, 3, 4).softmax(1)
    scaling.temperature.fill_(2.0)
    torch.testing.assert_close(scaling(p, dim=1), p.log().div(2).softmax(1))
    sure = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(scaling(sure), sure)
    for arguments in ((p,), (p[:, :1, 0, 0],)):
        with pytest.raises(ValueError, match=r"dim must say where|must have C >= 2"):
            scaling(*arguments)
    for bad in ([0.5, 0.5], torch.tensor([1, 0])):
        with pytest.raises(TypeError, match="probabilities must be a floating-point tensor, got"):
            scaling(bad)
