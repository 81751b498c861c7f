"""What a finished run has shown: a table for people, values for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastfreeze.files import write_atomic
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.text import format_table

METHOD_TITLES = {
    "sgd": "plain SGD",
    "freezeout": "FreezeOut",
    "snapshot": "Snapshot",
    "both": "FreezeOut + Snapshot",
    "prefix": "frozen prefix",
    "gradual": "gradual unfreezing",
    "full": "everything trains",
    "single": "step decay",
    "snapshot-0.1": "Snapshot, lr 0.1",
    "snapshot-0.2": "Snapshot, lr 0.2",
    "freezeout-0.8": "FreezeOut, t_0=0.8",
    "freezeout-0.5": "FreezeOut, t_0=0.5",
}
_Column = tuple[str, str, float, int]  # title, key in a result, factor, digits
_ERROR: _Column = ("error %", "error", 100, 2)
_SHARED: tuple[_Column, ...] = (
    ("NLL", "nll", 1, 4),
    ("ECE", "ece", 1, 4),
    ("time s", "seconds", 1, 1),
    ("CPU s", "cpu_seconds", 1, 1),
    ("backward removed %", "backward_removed", 100, 1),
)
_COLUMNS = (_ERROR, ("ensemble error %", "ensemble_error", 100, 2), *_SHARED)
_FINETUNE_COLUMNS = (
    _ERROR,
    ("validation error %", "validation_error", 100, 2),
    ("best epoch", "best_epoch", 1, 0),
    *_SHARED,
)
CPU_NOTE = "CPU: time of all threads, and of the processes that read images."
_NOTE = (
    "±: standard error of the mean over the seeds.\n{errors}\n"
    "time: reading batches, training and saving snapshots; evaluation and checkpoints are not "
    f"counted. {CPU_NOTE}\n"
    "backward removed: share of the run's backward FLOPs."
)
_ERRORS = (
    "error: of the last weights. ensemble error: of the averaged probabilities of all snapshots; "
    "NLL and ECE are the ensemble's where there is one. vs SGD: time, relative."
)
_FINETUNE_ERRORS = (
    "error, NLL, ECE: on the test images, of the weights of the epoch that is best on the training "
    "images held out for validation."
)


@dataclass(frozen=True)
class Table:
    """A table, and what it means.

    Attributes:
        headers, rows: its cells.
        note: what stands below it.
    """

    headers: list[str]
    rows: list[list[str]]
    note: str

    def __str__(self) -> str:
        return f"{format_table(self.headers, self.rows)}\n\n{self.note}"


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: a table for people, and the same and more for JSON."""

    table: Table
    values: Line

    def write(self, run_dir: RunDir) -> None:
        """Write the table into the run's directory."""
        write_atomic(run_dir.path / "table.txt", f"{self.table}\n".encode())


def cell(values: Sequence[float], digits: int) -> str:
    """One value, or mean ± standard error of several; "-" for none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"


def results_table(results: Sequence[Line]) -> Table:
    """A row per method: one seed's value, or mean ± standard error of several."""
    plain = _values(results, "sgd", "seconds")
    table = _table("method", results, _COLUMNS, _ERRORS)
    for row, method in zip(table.rows, _methods(results), strict=True):
        seconds = np.mean(_values(results, method, "seconds"))
        row.append(f"{seconds / np.mean(plain):.2f}x" if plain else "-")
    return replace(table, headers=[*table.headers, "vs SGD"])


def finetune_table(results: Sequence[Line]) -> Table:
    """The same of a fine-tuning."""
    return _table("recipe", results, _FINETUNE_COLUMNS, _FINETUNE_ERRORS)


def _table(first: str, results: Sequence[Line], columns: Sequence[_Column], errors: str) -> Table:
    rows = [[METHOD_TITLES[method]] for method in _methods(results)]
    for row, method in zip(rows, _methods(results), strict=True):
        for _, key, factor, digits in columns:
            row.append(cell([factor * v for v in _values(results, method, key)], digits))
    return Table([first, *(title for title, *_ in columns)], rows, _NOTE.format(errors=errors))


def _methods(results: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(result["method"] for result in results))


def _values(results: Sequence[Line], method: str, key: str) -> list[float]:
    return [r[key] for r in results if r["method"] == method and r[key] is not None]
