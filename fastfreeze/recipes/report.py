"""The table of a finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastfreeze.recipes.rundir import Line
from fastfreeze.text import format_table

METHOD_TITLES = {
    "sgd": "plain SGD",
    "freezeout": "FreezeOut",
    "snapshot": "Snapshot",
    "both": "FreezeOut + Snapshot",
}
# Column title, key in a result, factor, digits.
_COLUMNS = (
    ("error %", "error", 100, 2),
    ("ensemble error %", "ensemble_error", 100, 2),
    ("NLL", "nll", 1, 4),
    ("ECE", "ece", 1, 4),
    ("time s", "seconds", 1, 1),
    ("s/epoch", "seconds_per_epoch", 1, 2),
    ("backward removed %", "backward_removed", 100, 1),
    ("peak memory MB", "peak_memory_mb", 1, 0),
)
NOTE = (
    "±: standard error of the mean over the seeds.\n"
    "error: of the last weights. ensemble error: of the averaged probabilities of all snapshots; "
    "NLL and ECE are the ensemble's where there is one.\n"
    "time: reading batches, training and saving snapshots; evaluation and checkpoints are not "
    "counted. vs SGD: the same time, relative.\n"
    "backward removed: share of the run's backward FLOPs. "
    "peak memory: of the process on a CPU, of torch's allocator on a GPU."
)


def table_rows(results: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row per method: one seed's value, or mean ± standard error of several."""
    methods = dict.fromkeys(result["method"] for result in results)
    plain = _values(results, "sgd", "seconds")
    headers = ["method", *(title for title, *_ in _COLUMNS), "vs SGD"]
    rows = []
    for method in methods:
        row = [METHOD_TITLES[method]]
        for _, key, factor, digits in _COLUMNS:
            row.append(_cell([factor * v for v in _values(results, method, key)], digits))
        seconds = np.mean(_values(results, method, "seconds"))
        row.append(f"{seconds / np.mean(plain):.2f}x" if plain else "-")
        rows.append(row)
    return headers, rows


def text_table(results: Sequence[Line]) -> str:
    """The table for a terminal, and what its columns mean."""
    return f"{format_table(*table_rows(results))}\n\n{NOTE}"


def markdown_table(results: Sequence[Line]) -> str:
    """The table in Markdown, and what its columns mean."""
    headers, rows = table_rows(results)
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{NOTE}"


def _values(results: Sequence[Line], method: str, key: str) -> list[float]:
    return [r[key] for r in results if r["method"] == method and r[key] is not None]


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"
