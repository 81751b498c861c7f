"""The picture of ``python -m benchmarks report``: each line's ratio to its best rival."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.case import OURS
from benchmarks.lines import Line
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.plot import pyplot

if TYPE_CHECKING:
    from benchmarks.report import Table

OWN_COLOR, FLOOR_COLOR = "#2a7f3f", "#999999"
RATIOS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)
POWERS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
WIDE = 6  # times from an axis's left end to its right: fewer marks
LINE_HEIGHT, TITLE_HEIGHT = 0.19, 0.9  # inches


def draw(tables: Sequence[Table]) -> bytes:
    """A PNG of two columns of tables, one line beneath the other.

    Raises:
        fastfreeze.recipes.errors.RecipeError: matplotlib is not installed.
    """
    plt = pyplot()
    columns = [c for c in halves([t for t in tables if t.lines]) if c]
    height = max(sum(map(_height, column)) for column in columns)
    figure = plt.figure(figsize=(7 * len(columns), height), layout="constrained")
    for subfigure, column in zip(
        figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        ratios = list(map(_height, column))
        axes = subfigure.subplots(len(column), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axis, table in zip(axes[:, 0], column, strict=True):
            _draw_table(axis, table)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def halves(tables: Sequence[Table]) -> tuple[list[Table], list[Table]]:
    """Two columns in the order of the tables, as equal in height as that allows."""
    splits = [(list(tables[:i]), list(tables[i:])) for i in range(len(tables) + 1)]
    return min(splits, key=lambda split: max(sum(map(_height, column)) for column in split))


def _height(table: Table) -> float:
    return TITLE_HEIGHT + LINE_HEIGHT * len(table.lines)


def _draw_table(axis: Any, table: Table) -> None:
    rows = range(len(table.lines))
    for row, line in zip(rows, table.lines, strict=True):
        low, high = ratio_spread(line)
        axis.plot([low, high], [row, row], color=OWN_COLOR, linewidth=1.5)
        if line.floor is not None:
            axis.plot(line.best.median / line.floor, row, "|", color=FLOOR_COLOR, markersize=8)
    axis.plot([line.ratio for line in table.lines], rows, "o", color=OWN_COLOR, markersize=4)
    axis.axvline(1, color="0.2", linewidth=0.8)
    axis.set_xscale("log", base=2)
    ticker = optional_package("matplotlib.ticker")
    low, high = axis.get_xlim()
    ratios = RATIOS if high < WIDE * low else POWERS
    axis.xaxis.set_major_locator(ticker.FixedLocator(ratios))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_yticks(rows, [_label(line) for line in table.lines], fontsize=7)
    axis.set_ylim(len(table.lines) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.tick_params(axis="x", labelsize=7)
    machine = table.hardware.partition(", Python")[0]
    axis.set_title(f"{table.title}\n{machine}", fontsize=7, loc="left")
    axis.set_xlabel("the best rival takes that many times as long; | the floor", fontsize=7)


def ratio_spread(line: Line) -> tuple[float, float]:
    """The ratio, had both sides' times been at opposite ends of what they lie between."""
    return line.best.low / line.own.high, line.best.high / line.own.low


def _label(line: Line) -> str:
    return line.key if line.ours == OURS else f"{line.key}: {line.ours}"
