"""``fastfreeze compare``: methods with the same seeds as a baseline, and their differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.rundir import Line
from fastfreeze.recipes.runs import Experiment
from fastfreeze.recipes.tables import CPU_NOTE, METHOD_TITLES, Outcome, Table
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


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """What a comparison is asked to do: a training of each method, and first of the baseline."""

    baseline: str

    def experiment(self, data: ImageData) -> Experiment:
        return self._training(dict.fromkeys([self.baseline, *self.methods]))

    def check(self, data: ImageData) -> None:
        if set(self.methods) <= {self.baseline}:
            raise ValueError(f"methods must hold one that is not the baseline, {self.baseline}")
        optional_package("scipy.stats")  # before the training that it is for
        super().check(data)

    def outcome(self, results: Sequence[Line], data: ImageData) -> Outcome:
        comparisons = compare(results, self.baseline)
        values = {"baseline": self.baseline, "confidence": CONFIDENCE}
        compared = [asdict(comparison) for comparison in comparisons]
        table = comparison_table(comparisons)
        return Outcome(table, {**values, "comparison": compared, "results": results})


@dataclass(frozen=True)
class Spread:
    """Values of several seeds, in the seeds' order.

    Attributes:
        values, mean, sd: the last with n - 1 degrees of freedom.
        low, high: Student's interval, which holds the mean with 95% confidence.
    """

    values: list[float]
    mean: float
    sd: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of n >= 2 values.

        Raises:
            RecipeError: SciPy is not installed.
        """
        mean, sd, n = float(np.mean(values)), float(np.std(values, ddof=1)), len(values)
        t = float(optional_package("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1))
        half = t * sd / math.sqrt(n)
        return cls(list(values), mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """One method beside the baseline; differences are None for the baseline itself.

    Attributes:
        method: its name.
        n: seeds.
        error, nll: what it reaches, in 0..1 and in nats; of its ensemble, if it has one.
        error_difference, nll_difference: its value minus the baseline's.
        seconds, cpu_seconds: of training.
        time_saved: share of the baseline's time, in ..1.
    """

    method: str
    n: int
    error: Spread
    error_difference: Spread | None
    nll: Spread
    nll_difference: Spread | None
    seconds: Spread
    cpu_seconds: Spread
    time_saved: Spread | None


def compare(results: Sequence[Line], baseline: str) -> list[Comparison]:
    """Each method's results beside the baseline's of the same seeds; the baseline comes first.

    Args:
        results: of every method with the same n >= 2 seeds.
        baseline: the name of one of the methods.
    """
    methods = dict.fromkeys([baseline, *(result["method"] for result in results)])
    return [_comparison(results, method, baseline) for method in methods]


def _comparison(results: Sequence[Line], method: str, baseline: str) -> Comparison:
    own, other = ({r["seed"]: r for r in results if r["method"] == m} for m in (method, baseline))
    pairs = [(own[seed], other[seed]) for seed in sorted(own)]

    def spread(value: Callable[[Line], float]) -> Spread:
        return Spread.of([value(a) for a, _ in pairs])

    def paired(difference: Callable[[Line, Line], float]) -> Spread | None:
        return None if method == baseline else Spread.of([difference(*pair) for pair in pairs])

    return Comparison(
        method,
        len(pairs),
        spread(_error),
        paired(lambda a, b: _error(a) - _error(b)),
        spread(lambda a: float(a["nll"])),
        paired(lambda a, b: float(a["nll"] - b["nll"])),
        spread(lambda a: float(a["seconds"])),
        spread(lambda a: float(a["cpu_seconds"])),
        paired(lambda a, b: 1 - float(a["seconds"] / b["seconds"])),
    )


def _error(result: Line) -> float:
    ensemble = result["ensemble_error"]
    return float(result["error"] if ensemble is None else ensemble)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Each quantity of each method, as :func:`compare` gives them: the baseline is the first."""
    rows = []
    for title, names, factor, digits in (
        ("error %", ("error", "error_difference", "error_difference"), 100, 2),
        ("NLL", ("nll", "nll_difference", "nll_difference"), 1, 4),
        ("time s", ("seconds", "", ""), 1, 1),
        ("CPU s", ("cpu_seconds", "", ""), 1, 1),
        ("time saved %", ("time_saved", "", "time_saved"), 100, 1),
    ):
        for c in comparisons:
            mean, difference, interval = (getattr(c, name) if name else None for name in names)
            if mean is not None:
                cells = [
                    _mean(mean, factor, f".{digits}f"),
                    _mean(difference, factor, f"+.{digits}f"),
                ]
                cells.append(_interval(interval, factor, f"+.{digits}f"))
                rows.append([title, METHOD_TITLES[c.method], *cells])
    headers = ["", "method", "mean", "difference", "95% interval"]
    n, baseline = comparisons[0].n, METHOD_TITLES[comparisons[0].method]
    return Table(headers, rows, _NOTE.format(n=n, baseline=baseline, freedom=n - 1))


def _mean(spread: Spread | None, factor: float, form: str) -> str:
    if spread is None:
        return "-"
    return f"{factor * spread.mean:{form}} ± {factor * spread.sd:{form.lstrip('+')}}"


def _interval(spread: Spread | None, factor: float, form: str) -> str:
    if spread is None:
        return "-"
    return f"{factor * spread.low:{form}} .. {factor * spread.high:{form}}"
