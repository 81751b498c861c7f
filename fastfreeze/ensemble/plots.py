"""A picture of calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.ensemble.scores import confidence_and_correct, ece_of_rows, sums_in_bins
from fastfreeze.text import human_count

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_ACCURACY_COLOR = "#4c72b0"
_ABOVE_COLOR = "#c44e52"
_BELOW_COLOR = "#55a868"
_PALEST = 0.15


def reliability_diagram(
    probabilities: Tensor, labels: Tensor, *, num_bins: int = 15, ax: Axes | None = None
) -> Axes:
    """Draw accuracy against confidence (Guo et al., ICML 2017, figure 1).

    A bar for each bin of :func:`~fastfreeze.ensemble.expected_calibration_error` that has rows:
    their accuracy, and by how much their mean confidence is above or below it. Under the bar stands
    how many they are (where 40 bins or fewer leave space), and the fewer beside the fullest bin,
    the paler the bar: what a handful of rows say is mostly chance. The title has the error, and the
    number of all rows.

    Args:
        probabilities: [B, C], B >= 1, floating point, rows summing to 1.
        labels: [B], integers in 0..C-1.
        num_bins: >= 1.
        ax: where to draw. None: a new pyplot figure, which is the caller's to show and to close.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: ``probabilities``, ``labels`` or ``num_bins`` are not such.
        ImportError: matplotlib is not installed.
    """
    check_int("num_bins", num_bins, minimum=1)
    confidence, correct = confidence_and_correct(probabilities, labels)
    counts, sum_confidence, num_correct = sums_in_bins(confidence, correct, num_bins)
    ax = _axes(ax)
    from matplotlib.patches import Patch

    used = counts.nonzero().squeeze(-1)
    centres = ((used + 0.5) / num_bins).tolist()
    rows = counts[used]
    accuracy, mean_confidence = num_correct[used] / rows, sum_confidence[used] / rows
    agreed = torch.minimum(accuracy, mean_confidence)
    above, below = mean_confidence - agreed, accuracy - agreed
    alphas = (_PALEST + (1 - _PALEST) * (rows / rows.max()).sqrt()).tolist()
    legend: list[Artist] = []
    for bottom, height, color, label in (
        (torch.zeros_like(agreed), agreed, _ACCURACY_COLOR, "accuracy"),
        (agreed, above, _ABOVE_COLOR, "confidence above the accuracy"),
        (agreed, below, _BELOW_COLOR, "accuracy above the confidence"),
    ):
        colors = [(color, alpha) for alpha in alphas]
        ax.bar(centres, height.tolist(), 1 / num_bins, bottom.tolist(), color=colors, label=label)
        legend.append(Patch(color=color, label=label))
    legend += ax.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1, label="both equal")
    for centre, count in zip(centres, rows.tolist(), strict=True) if num_bins <= 40 else ():
        text = human_count(int(count))
        ax.text(centre, -0.02, text, ha="center", va="top", rotation=90, fontsize="x-small")
    ax.set(xlim=(0, 1), ylim=(-0.14, 1), xlabel="confidence (under each bar: its rows)")
    ax.set(ylabel="accuracy", yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    error = ece_of_rows(confidence, correct, num_bins)
    ax.set_title(f"ECE {error:.4f}, {len(confidence):,} rows; paler: fewer rows", fontsize="medium")
    ax.legend(handles=legend, loc="upper left", fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    """``ax``, or those of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            'plots need matplotlib, which is not installed: pip install "fastfreeze[train]"'
        ) from error
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    return ax
