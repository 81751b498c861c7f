"""Plots show the values that were computed, on the axes that were asked for."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from fastfreeze.ensemble.metrics import disagreement, expected_calibration_error
from fastfreeze.ensemble.plots import diversity_plot, reliability_diagram


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


@pytest.mark.parametrize("num_bins", [1, 4, 15, 100])
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_the_bars_of_the_reliability_diagram(num_bins, rows):
    probabilities, labels = predictions(rows)
    expected = []
    for i in range(num_bins):
        binned = [
            (row.max().item(), row.argmax().item() == label)
            for row, label in zip(probabilities, labels.tolist(), strict=True)
            if i / num_bins < row.max() <= (i + 1) / num_bins
        ]
        if binned:
            confidence = sum(c for c, _ in binned) / len(binned)
            accuracy = sum(right for _, right in binned) / len(binned)
            expected.append(((i + 0.5) / num_bins, accuracy, confidence - accuracy, len(binned)))

    ax = reliability_diagram(probabilities, labels, num_bins=num_bins)
    parts = [bars(ax, label) for label in ("accuracy", *GAPS)]
    most = max(count for *_, count in expected)
    for drawn, (centre, accuracy, difference, count) in zip(
        zip(*parts, strict=True), expected, strict=True
    ):
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


def test_the_numbers_of_the_diversity_plot():
    matrix = disagreement(torch.randn(3, 40, 5).softmax(-1))
    ax = diversity_plot(matrix, errors=[0.1, 0.25, 0.5])
    found = {text.get_position(): text.get_text() for text in ax.texts}
    expected = {(j, i): f"{100 * matrix[i, j]:.1f}" for i in range(3) for j in range(3)}
    assert found == expected
    assert torch.equal(torch.as_tensor(ax.images[0].get_array()), matrix)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["member 0\nerror 10.00%", "member 1\nerror 25.00%", "member 2\nerror 50.00%"]
    ax.figure.canvas.draw()


def test_members_that_never_differ():
    ax = diversity_plot(torch.zeros(2, 2))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["member 0", "member 1"]
    assert ax.images[0].get_clim() == (0, 1)


PLOTS = {
    "reliability": lambda ax=None: reliability_diagram(*predictions(20), ax=ax),
    "diversity": lambda ax=None: diversity_plot(torch.zeros(2, 2), ax=ax),
}
every_plot = pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)


@every_plot
def test_no_figure_but_the_callers(plot):
    figure, (left, right) = plt.subplots(1, 2)
    assert plot(ax=right) is right
    assert plt.get_fignums() == [figure.number]
    assert not left.has_data()
    plt.close(figure)
    ax = plot()
    assert plt.get_fignums() == [ax.figure.number]


Y = torch.tensor([0, 1])
MATRIX = torch.zeros(2, 2)
REFUSED = {
    "logits": (reliability_diagram, (torch.eye(2) * 2, Y), "probabilities.* must sum to 1"),
    "labels": (reliability_diagram, (torch.eye(2), Y + 1), "labels.* must be in 0..1, got 2"),
    "a list": (diversity_plot, ([[0.0]],), "disagreement_matrix must be a .* got list"),
    "integers": (diversity_plot, (MATRIX.long(),), "floating-point tensor, got torch.int64"),
    "not square": (diversity_plot, (torch.ones(2, 3),), r"\[M, M\], M >= 1, got \(2, 3\)"),
    "empty": (diversity_plot, (MATRIX[:0, :0],), r"\[M, M\], M >= 1, got \(0, 0\)"),
    "percent": (diversity_plot, (MATRIX + 50,), "matrix must be in 0..1, got 50.0"),
    "nan": (diversity_plot, (MATRIX * math.nan,), "matrix must be in 0..1, got nan"),
    "too few errors": (diversity_plot, (MATRIX, [0.1]), "errors must be 2 numbers, got 1"),
    "errors in percent": (diversity_plot, (MATRIX, [0.1, 5]), r"errors must be in 0..1, got \[0"),
}


@pytest.mark.parametrize(("plot", "arguments", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_no_figure(plot, arguments, match):
    with pytest.raises((TypeError, ValueError), match=match):
        plot(*arguments)
    assert plt.get_fignums() == []


def test_refused_bins():
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        reliability_diagram(torch.eye(2), Y, num_bins=0)
    assert plt.get_fignums() == []


@every_plot
def test_without_matplotlib_the_error_names_the_extra(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "fastfreeze\[train\]"'):
        plot()


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
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
