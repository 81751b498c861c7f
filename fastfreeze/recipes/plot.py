"""Pictures of a run, of an ensemble's calibration, and of methods beside one another."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastfreeze.ensemble import reliability_diagram
from fastfreeze.files import write_atomic
from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.report import METHOD_TITLES
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.schedule import FloatArray, from_config

_OURS_COLOR = "#4c72b0"
_PAPER_COLOR = "#b0b0b0"
_FREEZE_COLOR = "#c44e52"
_SNAPSHOT_COLOR = "#2a7f3f"
_CPU_COLOR = "#dd8452"
_SMOOTHING = 0.05  # of the steps, for losses and times


def plot_run(run_dir: RunDir, path: Path) -> None:
    """Draw a run as a PNG: a column per method, of the run's first seed.

    Rows: the learning rate of each layer; the training loss, with snapshots and freezes marked; the
    test error, with that of the ensemble; the time of a step.

    Raises:
        RecipeError: no method has finished an epoch yet, or matplotlib is not installed.
    """
    plt = pyplot()
    histories = _histories(run_dir)
    if not histories:
        raise RecipeError(f"{run_dir.path} has nothing to plot yet: no epoch has finished")
    figure, axes = plt.subplots(
        4,
        len(histories),
        figsize=(1.5 + 3.6 * len(histories), 9.5),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    results = {r["method"]: r for r in reversed(run_dir.results())}
    for column, (method, lines) in zip(axes.T, histories.items(), strict=True):
        column[0].set_title(METHOD_TITLES[method])
        _plot_rates(column[0], lines)
        _plot_losses(column[1], lines)
        _plot_errors(column[2], lines, results.get(method))
        _plot_times(column[3], lines)
        column[3].set_xlabel("step")
    usual = max(np.median(_per_step(lines, "step_seconds")) for lines in histories.values())
    axes[3, 0].set_ylim(0, 3e3 * usual)  # a step that waited for other work would flatten the rest
    for axis, label in zip(
        axes[:, 0], ("learning rate", "training loss", "test error %", "ms per step"), strict=True
    ):
        axis.set_ylabel(label)
    arguments = run_dir.arguments
    figure.suptitle(f"{arguments['model']} on {arguments['data']}, seed {arguments['seed']}")
    write_atomic(path, _png(figure))
    plt.close(figure)


def plot_ensemble(probabilities: Tensor, labels: Tensor) -> bytes:
    """A PNG of an ensemble's calibration.

    Args:
        probabilities: [B, C], the ensemble's.
        labels: [B].

    Raises:
        RecipeError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 4.5), layout="constrained")
    reliability_diagram(probabilities, labels, ax=axis)
    picture = _png(figure)
    plt.close(figure)
    return picture


@dataclass(frozen=True)
class Bars:
    """Ours beside the paper's, where it has a number."""

    ylabel: str
    labels: list[str]
    ours: list[float]
    paper: list[float | None]

    def draw(self, axis: Any) -> None:
        """Draw them on an axis."""
        places, paper = np.arange(len(self.labels)), [p for p in self.paper if p is not None]
        width = 0.4 if paper else 0.6
        axis.bar(places, self.ours, width, color=_OURS_COLOR, label="ours")
        if paper:
            there = [
                place + width for place, p in zip(places, self.paper, strict=True) if p is not None
            ]
            axis.bar(there, paper, width, color=_PAPER_COLOR, label="paper")
        middle = width / 2 if paper else 0
        axis.set_xticks(places + middle, self.labels, rotation=15)
        axis.set_ylabel(self.ylabel)
        axis.legend(fontsize="small")


@dataclass(frozen=True)
class Curves:
    """Lines over 1, 2, ..."""

    xlabel: str
    ylabel: str
    lines: dict[str, list[float]]

    def draw(self, axis: Any) -> None:
        """Draw them on an axis."""
        for label, values in self.lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="o", label=label)
        axis.set_xlabel(self.xlabel)
        axis.set_ylabel(self.ylabel)
        axis.legend(fontsize="small")


Panel = Bars | Curves


@dataclass(frozen=True)
class Dots:
    """A row for each method: a dot for each seed, joined to the same seed's next, and the mean.

    Attributes:
        xlabel: what all of them are.
        digits: of the means, behind the point.
        series: by name and method, the values of each seed.
    """

    xlabel: str
    digits: int
    series: dict[str, dict[str, list[float]]]

    def draw(self, axis: Any) -> None:
        """Draw them on an axis."""
        colors = dict(zip(self.series, (_OURS_COLOR, _CPU_COLOR), strict=False))
        for i, (name, rows) in enumerate(self.series.items()):
            places = np.arange(len(rows)) + 0.36 * (i - (len(self.series) - 1) / 2)
            axis.plot(list(rows.values()), places, color=colors[name], alpha=0.2, linewidth=1)
            for place, values in zip(places, rows.values(), strict=True):
                mean = float(np.mean(values))
                axis.scatter(values, [place] * len(values), color=colors[name], alpha=0.5, s=25)
                axis.scatter(mean, place, marker="|", s=300, color=colors[name])
                axis.annotate(
                    f"{mean:.{self.digits}f}",
                    (mean, place),
                    (0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize="small",
                    color=colors[name],
                )
            axis.scatter([], [], color=colors[name], label=name)
            axis.set_yticks(range(len(rows)), list(rows))
            axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.margins(x=0.08)
        axis.set_xlim(left=0)
        axis.set_xlabel(self.xlabel)
        if len(self.series) > 1:
            axis.legend(
                fontsize="small",
                loc="lower right",
                bbox_to_anchor=(1, 1),
                ncols=len(self.series),
                frameon=False,
            )


def plot_comparison(title: str, left: Dots, right: Dots) -> bytes:
    """A PNG of two panels with a row for each method, the same in both.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    plt = pyplot()
    [rows] = {len(rows) for dots in (left, right) for rows in dots.series.values()}
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.8 * rows), sharey=True, layout="constrained"
    )
    figure.suptitle(title)
    for axis, dots in zip(axes, (left, right), strict=True):
        dots.draw(axis)
    picture = _png(figure)
    plt.close(figure)
    return picture


def plot_reproduction(run_dir: RunDir, title: str, panels: tuple[Panel, Panel]) -> bytes:
    """A PNG of two panels, and of each method's learning rates below them.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    plt = pyplot()
    histories = _histories(run_dir)
    figure = plt.figure(figsize=(3.6 * max(2, len(histories)), 7), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize="medium")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    for axis, panel in zip(above.subplots(1, 2), panels, strict=True):
        panel.draw(axis)
    axes = below.subplots(1, len(histories), sharey=True, squeeze=False)[0]
    for axis, (method, lines) in zip(axes, histories.items(), strict=True):
        _plot_rates(axis, lines)
        axis.set_title(METHOD_TITLES[method], fontsize="medium")
        axis.set_xlabel("step")
    axes[0].set_ylabel("learning rate")
    picture = _png(figure)
    plt.close(figure)
    return picture


def pyplot() -> Any:
    """matplotlib's, which draws into files alone.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    optional_package("matplotlib").use("Agg")
    return optional_package("matplotlib.pyplot")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _histories(run_dir: RunDir) -> dict[str, list[Line]]:
    """The lines of each method's first seed, if it has finished an epoch."""
    histories: dict[str, list[Line]] = {}
    for line in run_dir.metrics():
        if line["seed"] == run_dir.arguments["seed"]:
            histories.setdefault(line["method"], []).append(line)
    return {m: lines for m, lines in histories.items() if _events(lines, "epoch")}


def _events(lines: list[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def _per_step(lines: list[Line], key: str) -> FloatArray:
    return np.concatenate([line[key] for line in _events(lines, "epoch")])


def _plot_rates(axis: Any, lines: list[Line]) -> None:
    """A line per layer, from the input's (dark) to the head's (bright); none where it is frozen."""
    start = lines[0]
    schedule = from_config(start["schedule"])
    layers = start["layers"] if schedule.needs_layers else ["all layers"]
    steps = np.arange(schedule.total_steps)
    colors = optional_package("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, (name, color) in enumerate(zip(layers, colors, strict=True)):
        lr = schedule.lr(steps, start["lr"], layer, len(layers))
        frozen = [schedule.is_frozen(int(step), layer, len(layers)) for step in steps]
        label = name if layer in (0, len(layers) - 1) else None
        axis.plot(
            steps, np.where(frozen, np.nan, lr), color=color, label=label, drawstyle="steps-post"
        )
    axis.legend(fontsize="small")


def _plot_losses(axis: Any, lines: list[Line]) -> None:
    losses = _per_step(lines, "step_losses")
    axis.plot(losses, color="0.8", linewidth=0.5)
    axis.plot(*_smoothed(losses, np.mean), color="0.15", label="loss, smoothed")
    for event, color, style in (
        ("snapshot", _SNAPSHOT_COLOR, "-"),
        ("freeze", _FREEZE_COLOR, ":"),
        ("thaw", _CPU_COLOR, ":"),
    ):
        for i, step in enumerate(sorted({line["step"] for line in _events(lines, event)})):
            label = f"{event}s" if i == 0 else None
            axis.axvline(step, color=color, linestyle=style, linewidth=1, label=label)
    axis.set_yscale("log")
    axis.legend(fontsize="small")


def _plot_errors(axis: Any, lines: list[Line], result: Line | None) -> None:
    epochs = _events(lines, "epoch")
    held_out = "validation_error" in epochs[0]
    errors = [100 * line["validation_error" if held_out else "test_error"] for line in epochs]
    what = "images held out" if held_out else "weights"
    axis.plot(
        [line["step"] for line in epochs],
        errors,
        color="0.15",
        marker=".",
        label=f"{what}, at the end {errors[-1]:.2f}",
    )
    if result is not None and held_out:
        best = epochs[result["best_epoch"] - 1]["step"]
        error = 100 * result["error"]
        axis.plot(best, error, "*", color=_SNAPSHOT_COLOR, label=f"best, tested {error:.2f}")
    if result is not None and result["ensemble_error"] is not None:
        error = 100 * result["ensemble_error"]
        axis.axhline(error, color=_SNAPSHOT_COLOR, linestyle="--", label=f"ensemble {error:.2f}")
    axis.set_yscale("symlog", linthresh=1)  # from above ten down to zero
    axis.set_ylim(0, 100)
    axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axis.legend(fontsize="small")


def _plot_times(axis: Any, lines: list[Line]) -> None:
    times = 1e3 * _per_step(lines, "step_seconds")
    axis.plot(times, color="0.8", linewidth=0.5)
    axis.plot(*_smoothed(times, np.median), color="0.15", label="median")
    axis.legend(fontsize="small")


def _smoothed(
    values: FloatArray, reduce: Callable[..., FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Centres and values of a moving window."""
    width = max(1, int(_SMOOTHING * len(values)))
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    centres = np.arange(len(windows), dtype=np.float64) + (width - 1) / 2
    return centres, reduce(windows, axis=1)
