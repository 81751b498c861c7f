"""``fastfreeze compare``: methods with the same seeds as a baseline, and their differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.rundir import Line
from fastfreeze.recipes.runs import Experiment
from fastfreeze.recipes.tables import CPU_NOTE, METHOD_TITLES, Table, by_method
from fastfreeze.recipes.train import TrainConfig

CONFIDENCE = 0.95
_NOTE = (
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
class CompareConfig(TrainConfig):
    """What a comparison is asked to do: a training of each method, and first of the baseline."""

    baseline: str

    def trained(self) -> Iterable[str]:
        return dict.fromkeys([self.baseline, *self.methods])

    def experiment(self, data: ImageData) -> Experiment:
        if set(self.methods) <= {self.baseline}:
            raise ValueError(f"methods must hold one that is not the baseline, {self.baseline}")
        optional_package("scipy.stats")  # before the training that it is for
        return super().experiment(data)

    def outcome(self, results: Sequence[Line], data: ImageData) -> tuple[Table, Line]:
        compared = compare(results, self.baseline)
        values = {"baseline": self.baseline, "confidence": CONFIDENCE, "comparison": compared}
        return comparison_table(compared), values


def spread(values: Sequence[float]) -> Line:
    """Of n >= 2 seeds' values: mean, deviation (n - 1), and Student's 95% interval of the mean."""
    mean, sd, n = float(np.mean(values)), float(np.std(values, ddof=1)), len(values)
    half = float(optional_package("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half *= sd / math.sqrt(n)
    return {"values": list(values), "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def compare(results: Sequence[Line], baseline: str) -> list[Line]:
    """Each method's :func:`spread` of error, NLL and times, and of the differences to the baseline.

    Errors are in 0..1, NLL in nats, of the ensemble where there is one; ``time_saved`` is a share
    of the baseline's time, in ..1. Differences are None for the baseline, which comes first.

    Args:
        results: of every method with the same n >= 2 seeds.
        baseline: the name of one of the methods.
    """
    delivered = [
        r if r["ensemble_error"] is None else {**r, "error": r["ensemble_error"]} for r in results
    ]
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
    return Table(headers, rows, _NOTE.format(n=n, baseline=baseline, freedom=n - 1))


def _cell(text: str, found: Line | None, factor: float, digits: int, sign: str = "+") -> str:
    if found is None:
        return "-"
    scaled = {key: factor * found[key] for key in ("mean", "sd", "low", "high")}
    return text.format(**scaled, form=f"{sign}.{digits}f", plain=f".{digits}f")
