"""Plots show the values that were computed, on the axes that were asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from fastfreeze.ensemble.plots import reliability_diagram
from fastfreeze.ensemble.scores import expected_calibration_error
from tests.ensemble.test_metrics import binned


@pytest.fixture(autouse=True)
def _no_windows():
    plt.switch_backend("agg")
    plt.close("all")  # what another file's tests left open
    yield
    plt.close("all")


def predictions(rows):
    probabilities = torch.randn(rows, 4, dtype=torch.float64).mul(2).softmax(-1)
    return probabilities, torch.randint(4, (rows,))


GAPS = ("confidence above the accuracy", "accuracy above the confidence")


def bars(axes, label):
    [container] = [c for c in axes.containers if c.get_label() == label]
    return list(container)


@pytest.mark.parametrize(("num_bins", "rows"), [(1, 33), (4, 200), (15, 1), (15, 200), (100, 33)])
def test_the_bars_of_the_reliability_diagram(num_bins, rows):
    probabilities, labels = predictions(rows)
    expected = binned(probabilities, labels, num_bins)
    ax = reliability_diagram(probabilities, labels, num_bins=num_bins)
    parts = [bars(ax, label) for label in ("accuracy", *GAPS)]
    most = max(count for *_, count in expected)
    for drawn, (centre, accuracy, confidence, count) in zip(
        zip(*parts, strict=True), expected, strict=True
    ):
        difference = confidence - accuracy
        for bar in drawn:
            assert bar.get_width() == pytest.approx(1 / num_bins)
            assert bar.get_x() + bar.get_width() / 2 == pytest.approx(centre)
            assert bar.get_alpha() is None
            assert bar.get_facecolor()[3] == pytest.approx(0.15 + 0.85 * (count / most) ** 0.5)
        agreed, above, below = drawn
        assert (agreed.get_y(), agreed.get_height()) == (
            0,
            pytest.approx(accuracy - max(-difference, 0)),
        )
        for bar, height in ((above, max(difference, 0)), (below, max(-difference, 0))):
            assert bar.get_y() == pytest.approx(agreed.get_height())  # parts do not overlap
            assert bar.get_height() == pytest.approx(height, abs=1e-12)
    counts = [text.get_text() for text in ax.texts]
    assert counts == ([] if num_bins > 40 else [str(count) for *_, count in expected])
    error = expected_calibration_error(probabilities, labels, num_bins)
    assert ax.get_title() == f"ECE {error:.4f}, {rows} rows; paler: fewer rows"
    ax.figure.canvas.draw()


def test_every_color_of_the_reliability_diagram_is_in_its_legend():
    ax = reliability_diagram(*predictions(200))
    found = {p.get_label(): p.get_facecolor() for p in ax.get_legend().get_patches()}
    assert list(found) == ["accuracy", *GAPS]
    for label, color in found.items():
        assert color[3] == 1
        assert {bar.get_facecolor()[:3] for bar in bars(ax, label)} == {color[:3]}


def test_no_figure_but_the_callers():
    figure, (left, right) = plt.subplots(1, 2)
    assert reliability_diagram(*predictions(20), ax=right) is right
    assert plt.get_fignums() == [figure.number]
    assert not left.has_data()
    plt.close(figure)
    ax = reliability_diagram(*predictions(20))
    assert plt.get_fignums() == [ax.figure.number]


Y = torch.tensor([0, 1])
REFUSED = {
    "logits": ((torch.eye(2) * 2, Y), {}, "probabilities.* must sum to 1"),
    "labels": ((torch.eye(2), Y + 1), {}, "labels.* must be in 0..1, got 2"),
    "bins": ((torch.eye(2), Y), {"num_bins": 0}, "num_bins must be >= 1, got 0"),
}


@pytest.mark.parametrize(("arguments", "options", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_no_figure(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        reliability_diagram(*arguments, **options)
    assert plt.get_fignums() == []


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "fastfreeze\[train\]"'):
        reliability_diagram(*predictions(20))


@pytest.mark.slow
def test_without_a_display_and_imported_only_when_drawing():
    code = """
import sys, torch
from fastfreeze.ensemble import plots
assert "matplotlib" not in sys.modules
ax = plots.reliability_diagram(torch.eye(3), torch.arange(3))
ax.figure.canvas.draw()
"""
    unset = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)
