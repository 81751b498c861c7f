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
_COLUMNS: tuple[_Column, ...] = (
    ("error %", "error", 100, 2),
    ("ensemble error %", "ensemble_error", 100, 2),
    ("NLL", "nll", 1, 4),
    ("ECE", "ece", 1, 4),
    ("time s", "seconds", 1, 1),
    ("CPU s", "cpu_seconds", 1, 1),
    ("backward removed %", "backward_removed", 100, 1),
    ("peak memory MB", "peak_memory_mb", 1, 0),
)
_FINETUNE_COLUMNS: tuple[_Column, ...] = (
    _COLUMNS[0],
    ("validation error %", "validation_error", 100, 2),
    ("best epoch", "best_epoch", 1, 0),
    *_COLUMNS[2:],
)
CPU_NOTE = "CPU: time of all threads, and of the processes that read images."
_SEEDS_NOTE = "±: standard error of the mean over the seeds.\n"
_TIME_NOTE = (
    "time: reading batches, training and saving snapshots; evaluation and checkpoints are not "
    f"counted. {CPU_NOTE}"
)
_REMOVED_NOTE = (
    "backward removed: share of the run's backward FLOPs. "
    "peak memory: of the process on a CPU, of torch's allocator on a GPU."
)
_NOTE = (
    f"{_SEEDS_NOTE}"
    "error: of the last weights. ensemble error: of the averaged probabilities of all snapshots; "
    "NLL and ECE are the ensemble's where there is one.\n"
    f"{_TIME_NOTE} vs SGD: time, relative.\n{_REMOVED_NOTE}"
)
_FINETUNE_NOTE = (
    f"{_SEEDS_NOTE}"
    "error, NLL, ECE: on the test images, of the weights of the epoch that is best on the training "
    f"images held out for validation.\n{_TIME_NOTE}\n{_REMOVED_NOTE}"
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
    """What a run has come to.

    Attributes:
        table: for people.
        values: the same and more as plain data, for JSON.
    """

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
    table = _table("method", results, _COLUMNS, _NOTE)
    for row, method in zip(table.rows, _methods(results), strict=True):
        seconds = np.mean(_values(results, method, "seconds"))
        row.append(f"{seconds / np.mean(plain):.2f}x" if plain else "-")
    return replace(table, headers=[*table.headers, "vs SGD"])


def finetune_table(results: Sequence[Line]) -> Table:
    """The same of a fine-tuning."""
    return _table("recipe", results, _FINETUNE_COLUMNS, _FINETUNE_NOTE)


def _table(first: str, results: Sequence[Line], columns: Sequence[_Column], note: str) -> Table:
    rows = [
        [
            METHOD_TITLES[method],
            *(
                cell([factor * value for value in _values(results, method, key)], digits)
                for _, key, factor, digits in columns
            ),
        ]
        for method in _methods(results)
    ]
    return Table([first, *(title for title, *_ in columns)], rows, note)


def _methods(results: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(result["method"] for result in results))


def _values(results: Sequence[Line], method: str, key: str) -> list[float]:
    return [r[key] for r in results if r["method"] == method and r[key] is not None]
