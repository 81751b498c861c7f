"""A picture of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fastfreeze.files import write_atomic
from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.tables import METHOD_TITLES
from fastfreeze.schedule import FloatArray, from_config

_EVENTS = (("snapshot", "#2a7f3f", "-"), ("freeze", "#c44e52", ":"), ("thaw", "#dd8452", ":"))
_SNAPSHOT_COLOR = _EVENTS[0][1]
_SMOOTHING = 0.05  # of the steps, for losses and times


def plot_run(run_dir: RunDir, path: Path) -> None:
    """Draw a run as a PNG: a column per method, of the run's first seed.

    Rows: the learning rate of each layer; the training loss, with snapshots and freezes marked; the
    test error, with that of the ensemble; the time of a step.

    Raises RecipeError if no method has finished an epoch yet, or matplotlib is not installed.
    """
    plt = pyplot()
    arguments, histories = run_dir.arguments, _histories(run_dir)
    if not histories:
        raise RecipeError(f"{run_dir.path} has nothing to plot yet: no epoch has finished")
    count = len(histories)
    size = {"figsize": (1.5 + 3.6 * count, 9.5), "layout": "constrained"}
    figure, axes = plt.subplots(4, count, sharex="col", sharey="row", squeeze=False, **size)
    results = {r["method"]: r for r in reversed(run_dir.results())}
    usual = 0.0
    for column, (method, lines) in zip(axes.T, histories.items(), strict=True):
        epochs = _events(lines, "epoch")
        losses = np.concatenate([line["step_losses"] for line in epochs])
        times = np.concatenate([line["step_seconds"] for line in epochs])
        usual = max(usual, float(np.median(times)))
        column[0].set_title(METHOD_TITLES[method])
        _plot_rates(column[0], lines[0])
        _plot_smoothed(column[1], losses, "loss, smoothed")
        _mark_events(column[1], lines)
        column[1].set_yscale("log")
        _plot_errors(column[2], epochs, results.get(method))
        _plot_smoothed(column[3], 1e3 * times, "smoothed")
        column[3].set_xlabel("step")
        for axis in column:
            axis.legend(fontsize="small")
    axes[3, 0].set_ylim(0, 3e3 * usual)  # a step that waited for other work would flatten the rest
    labels = ("learning rate", "training loss", "test error %", "ms per step")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    figure.suptitle(f"{arguments['model']} on {arguments['data']}, seed {arguments['seed']}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def pyplot() -> Any:
    """matplotlib's, which draws into files alone.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    optional_package("matplotlib").use("Agg")
    return optional_package("matplotlib.pyplot")


def _histories(run_dir: RunDir) -> dict[str, list[Line]]:
    """The lines of each method's first seed, if it has finished an epoch."""
    histories: dict[str, list[Line]] = {}
    for line in run_dir.metrics():
        if line["seed"] == run_dir.arguments["seed"]:
            histories.setdefault(line["method"], []).append(line)
    return {m: lines for m, lines in histories.items() if _events(lines, "epoch")}


def _events(lines: list[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def _plot_rates(axis: Any, start: Line) -> None:
    """A line per layer, from the input's (dark) to the head's (bright); none where it is frozen."""
    schedule = from_config(start["schedule"])
    layers = start["layers"] if schedule.needs_layers else ["all layers"]
    steps = np.arange(schedule.total_steps)
    colors = optional_package("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, (name, color) in enumerate(zip(layers, colors, strict=True)):
        lr = schedule.lr(steps, start["lr"], layer, len(layers))
        frozen = [schedule.is_frozen(int(step), layer, len(layers)) for step in steps]
        label = name if layer in (0, len(layers) - 1) else None
        shown = np.where(frozen, np.nan, lr)
        axis.plot(steps, shown, color=color, label=label, drawstyle="steps-post")


def _plot_smoothed(axis: Any, values: FloatArray, label: str) -> None:
    """The values of each step, and medians of a moving window."""
    width = max(1, int(_SMOOTHING * len(values)))
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    centres = np.arange(len(windows)) + (width - 1) / 2
    axis.plot(values, color="0.8", linewidth=0.5)
    axis.plot(centres, np.median(windows, axis=1), color="0.15", label=label)


def _mark_events(axis: Any, lines: list[Line]) -> None:
    for event, color, style in _EVENTS:
        for i, step in enumerate(sorted({line["step"] for line in _events(lines, event)})):
            label = f"{event}s" if i == 0 else None
            axis.axvline(step, color=color, linestyle=style, linewidth=1, label=label)


def _plot_errors(axis: Any, epochs: list[Line], result: Line | None) -> None:
    held_out = "validation_error" in epochs[0]
    errors = [100 * line["validation_error" if held_out else "test_error"] for line in epochs]
    label = f"{'images held out' if held_out else 'weights'}, at the end {errors[-1]:.2f}"
    axis.plot([line["step"] for line in epochs], errors, ".-", color="0.15", label=label)
    if result is not None and held_out:
        best, error = epochs[result["best_epoch"] - 1]["step"], 100 * result["error"]
        axis.plot(best, error, "*", color=_SNAPSHOT_COLOR, label=f"best, tested {error:.2f}")
    if result is not None and result["ensemble_error"] is not None:
        error = 100 * result["ensemble_error"]
        axis.axhline(error, color=_SNAPSHOT_COLOR, linestyle="--", label=f"ensemble {error:.2f}")
    axis.set_yscale("symlog", linthresh=1)  # from above ten down to zero
    axis.set_ylim(0, 100)
    axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
