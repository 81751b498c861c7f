"""Tables of trainings' results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.rundir import Line
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
Column = tuple[str, str, float, int]  # title, key in a result, factor, digits
ERROR: Column = ("error %", "error", 100, 2)
TIMES: tuple[Column, ...] = (("time s", "seconds", 1, 1), ("CPU s", "cpu_seconds", 1, 1))
_SHARED: tuple[Column, ...] = (
    ("NLL", "nll", 1, 4),
    ("ECE", "ece", 1, 4),
    *TIMES,
    ("backward removed %", "backward_removed", 100, 1),
)
_COLUMNS = (ERROR, ("ensemble error %", "ensemble_error", 100, 2), *_SHARED)
_FINETUNE_COLUMNS = (
    ERROR,
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

CONFIDENCE = 0.95
_COMPARE_NOTE = (
    "{n} seeds. difference: to {baseline} with the same seed, that is from the same weights and on "
    "the same batches.\n"
    "mean ± standard deviation. 95% interval: of the mean difference or saving, by Student's t "
    "(degrees of freedom: {freedom}).\n"
    "error and NLL: of the averaged probabilities of all snapshots where a method takes them, else "
    "of the last weights.\n"
    f"time: reading batches, training and saving snapshots. {CPU_NOTE} time saved: 1 - time / the "
    "baseline's, seed by seed."
)
_PAIRED = ("error", "nll")
# Title, name of the mean, of the difference, and of what has an interval; factor, digits.
_QUANTITIES = (
    ("error %", "error", "error_difference", "error_difference", 100, 2),
    ("NLL", "nll", "nll_difference", "nll_difference", 1, 4),
    ("time s", "seconds", "", "", 1, 1),
    ("CPU s", "cpu_seconds", "", "", 1, 1),
    ("time saved %", "time_saved", "", "time_saved", 100, 1),
)


@dataclass(frozen=True)
class Table:
    """Headers and rows of cells, and a note that stands below and says what they mean."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def __str__(self) -> str:
        return f"{format_table(self.headers, self.rows)}\n\n{self.note}"


def by_method(results: Sequence[Line]) -> dict[str, list[Line]]:
    """The results of each method, in the order of their seeds."""
    found: dict[str, list[Line]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        found.setdefault(result["method"], []).append(result)
    return {method: found[method] for method in dict.fromkeys(r["method"] for r in results)}


def delivered_error(result: Line) -> float:
    """The error of the ensemble, or where there is none of the weights themselves."""
    own, ensemble = result["error"], result["ensemble_error"]
    return float(own if ensemble is None else ensemble)


def cells(results: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """Of each column one value, or mean ± standard error of several results; "-" for none."""
    found = []
    for _, key, factor, digits in columns:
        values = [factor * result[key] for result in results if result[key] is not None]
        found.append(f"{np.mean(values):.{digits}f}" if values else "-")
        if len(values) > 1:
            found[-1] += f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"
    return found


def titles(columns: Sequence[Column]) -> list[str]:
    """The columns' headers."""
    return [title for title, *_ in columns]


def results_table(results: Sequence[Line], advice: str = "") -> Table:
    """A row per method, and ``advice`` below."""
    methods, rows = by_method(results), []
    seconds = {m: np.mean([r["seconds"] for r in own]) for m, own in methods.items()}
    for method, own in methods.items():
        ratio = f"{seconds[method] / seconds['sgd']:.2f}x" if "sgd" in methods else "-"
        rows.append([METHOD_TITLES[method], *cells(own, _COLUMNS), ratio])
    headers = ["method", *titles(_COLUMNS), "vs SGD"]
    note = _NOTE.format(errors=_ERRORS)
    return Table(headers, rows, f"{note}\n\n{advice}" if advice else note)


def finetune_table(results: Sequence[Line]) -> Table:
    """A row per recipe."""
    methods = by_method(results).items()
    rows = [[METHOD_TITLES[method], *cells(own, _FINETUNE_COLUMNS)] for method, own in methods]
    headers = ["recipe", *titles(_FINETUNE_COLUMNS)]
    return Table(headers, rows, _NOTE.format(errors=_FINETUNE_ERRORS))


def spread(values: Sequence[float]) -> Line:
    """Of n >= 2 seeds' values: mean, deviation (n - 1), and Student's 95% interval of the mean."""
    mean, sd, n = float(np.mean(values)), float(np.std(values, ddof=1)), len(values)
    half = float(optional_package("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half *= sd / math.sqrt(n)
    return {"values": list(values), "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def compare(results: Sequence[Line], baseline: str) -> list[Line]:
    """Each method's :func:`spread` of error, NLL and times, and of the differences to the baseline.

    Errors are in 0..1, NLL in nats, of the ensemble where there is one; ``time_saved`` is a share
    of the baseline's time, at most 1. Differences are None for the baseline, which comes first.

    Args:
        results: of every method with the same n >= 2 seeds.
        baseline: the name of one of the methods.
    """
    delivered = [{**result, "error": delivered_error(result)} for result in results]
    methods, compared = by_method(delivered), []
    for method in dict.fromkeys([baseline, *methods]):
        own, pairs = methods[method], list(zip(methods[method], methods[baseline], strict=True))
        values = {key: [a[key] for a in own] for key in ("error", "nll", "seconds", "cpu_seconds")}
        paired = {f"{key}_difference": [a[key] - b[key] for a, b in pairs] for key in _PAIRED}
        paired["time_saved"] = [1 - a["seconds"] / b["seconds"] for a, b in pairs]
        entry: Line = {"method": method, "n": len(own)}
        entry |= {key: spread(found) for key, found in values.items()}
        entry |= {k: None if method == baseline else spread(v) for k, v in paired.items()}
        compared.append(entry)
    return compared


def comparison_table(compared: Sequence[Line]) -> Table:
    """Each quantity of each method, as :func:`compare` gives them: the baseline is the first."""
    rows = []
    for title, mean, difference, interval, factor, digits in _QUANTITIES:
        for c in compared:
            if c[mean] is not None:
                cells = [
                    _cell("{mean:{form}} ± {sd:{plain}}", c[mean], factor, digits, sign=""),
                    _cell("{mean:{form}} ± {sd:{plain}}", c.get(difference), factor, digits),
                    _cell("{low:{form}} .. {high:{form}}", c.get(interval), factor, digits),
                ]
                rows.append([title, METHOD_TITLES[c["method"]], *cells])
    headers = ["", "method", "mean", "difference", "95% interval"]
    n, baseline = compared[0]["n"], METHOD_TITLES[compared[0]["method"]]
    return Table(headers, rows, _COMPARE_NOTE.format(n=n, baseline=baseline, freedom=n - 1))


def _cell(text: str, found: Line | None, factor: float, digits: int, sign: str = "+") -> str:
    if found is None:
        return "-"
    scaled = {key: factor * found[key] for key in ("mean", "sd", "low", "high")}
    return text.format(**scaled, form=f"{sign}.{digits}f", plain=f".{digits}f")
