"""``fastfreeze compare``: methods with the same seeds as a baseline, and their differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.report import METHOD_TITLES, Report, Table
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, run_all
from fastfreeze.recipes.train import TrainConfig

CONFIDENCE = 0.95
_NOTE = (
    "{n} seeds: mean ± standard deviation. difference: to {baseline} with the same seed, that is "
    "from the same weights and on the same batches.\n"
    "95% interval: of the mean difference or saving, by Student's t (degrees of freedom: "
    "{freedom}).\n"
    "error and NLL: of the averaged probabilities of all snapshots where a method takes them, else "
    "of the last weights.\n"
    "time: reading batches, training and saving snapshots. time saved: 1 - time / the baseline's, "
    "seed by seed."
)


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """What a comparison is asked to do: a training, of at least two seeds.

    Attributes:
        baseline: one of :data:`fastfreeze.recipes.train.METHOD_NAMES`, trained before ``methods``.
    """

    baseline: str

    @property
    def experiment(self) -> Experiment:
        """The baseline's trainings, and those of the methods."""
        return self.training(dict.fromkeys([self.baseline, *self.methods]))

    def check(self, data: ImageData) -> None:
        """Raise ValueError where values that are fine alone do not fit together."""
        if set(self.methods) <= {self.baseline}:
            raise ValueError(f"methods must hold one that is not the baseline, {self.baseline}")
        super().check(data)

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Report:
        """Train, from where it stopped, and write the tables; see :func:`run_all`."""
        optional_package("scipy.stats")  # before the training that it is for
        results = run_all(self.experiment, data, run_dir, say, quiet)
        comparisons = compare(results, self.baseline)
        report = Report(
            comparison_table(comparisons),
            {
                "baseline": self.baseline,
                "confidence": CONFIDENCE,
                "comparison": [asdict(c) for c in comparisons],
                "results": results,
            },
        )
        report.write(run_dir)
        return report


@dataclass(frozen=True)
class Spread:
    """Values of several seeds: mean, and standard deviation (n - 1)."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of n >= 2 values."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class Paired(Spread):
    """Differences seed by seed, and an interval that holds their mean with 95% confidence."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Paired:
        """That of n >= 2 differences; Student's t, n - 1 degrees of freedom.

        Raises:
            RecipeError: SciPy is not installed.
        """
        spread, n = Spread.of(values), len(values)
        t = float(optional_package("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1))
        half = t * spread.sd / math.sqrt(n)
        return cls(spread.mean, spread.sd, spread.mean - half, spread.mean + half)


@dataclass(frozen=True)
class Comparison:
    """One method beside the baseline; differences are None for the baseline itself.

    Attributes:
        method: its name.
        n: seeds.
        error, nll: what it reaches, in 0..1 and in nats; of its ensemble, if it has one.
        error_difference, nll_difference: its value minus the baseline's.
        seconds: of training.
        time_saved: share of the baseline's time, in ..1.
    """

    method: str
    n: int
    error: Spread
    error_difference: Paired | None
    nll: Spread
    nll_difference: Paired | None
    seconds: Spread
    time_saved: Paired | None


def compare(results: Sequence[Line], baseline: str) -> list[Comparison]:
    """Each method's results beside the baseline's of the same seeds; the baseline comes first.

    Args:
        results: of every method with the same n >= 2 seeds.
        baseline: the name of one of the methods.
    """
    others = dict.fromkeys(r["method"] for r in results if r["method"] != baseline)
    return [_comparison(results, method, baseline) for method in (baseline, *others)]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Each quantity of each method; the baseline is the first."""
    rows = [
        *(_row("error %", c, c.error, c.error_difference, 100, 2) for c in comparisons),
        *(_row("NLL", c, c.nll, c.nll_difference, 1, 4) for c in comparisons),
        *(_row("time s", c, c.seconds, None, 1, 1) for c in comparisons),
        *(_saved_row(c, c.time_saved) for c in comparisons if c.time_saved is not None),
    ]
    baseline = comparisons[0]
    note = _NOTE.format(
        n=baseline.n,
        baseline=METHOD_TITLES[baseline.method],
        freedom=baseline.n - 1,
    )
    return Table(["", "method", "mean", "difference", "95% interval"], rows, note)


def _comparison(results: Sequence[Line], method: str, baseline: str) -> Comparison:
    own, other = ({r["seed"]: r for r in results if r["method"] == m} for m in (method, baseline))
    pairs = [(own[seed], other[seed]) for seed in sorted(own)]

    def paired(difference: Callable[[Line, Line], float]) -> Paired | None:
        return None if method == baseline else Paired.of([difference(*pair) for pair in pairs])

    return Comparison(
        method,
        len(pairs),
        Spread.of([_error(a) for a, _ in pairs]),
        paired(lambda a, b: _error(a) - _error(b)),
        Spread.of([a["nll"] for a, _ in pairs]),
        paired(lambda a, b: a["nll"] - b["nll"]),
        Spread.of([a["seconds"] for a, _ in pairs]),
        paired(lambda a, b: 1 - a["seconds"] / b["seconds"]),
    )


def _error(result: Line) -> float:
    ensemble = result["ensemble_error"]
    return float(result["error"] if ensemble is None else ensemble)


def _row(
    name: str,
    comparison: Comparison,
    value: Spread,
    difference: Paired | None,
    factor: float,
    digits: int,
) -> list[str]:
    title = METHOD_TITLES[comparison.method]
    cells = [name, title, _spread(value, factor, f".{digits}f")]
    if difference is None:
        return [*cells, "-", "-"]
    signed = f"+.{digits}f"
    return [*cells, _spread(difference, factor, signed), _interval(difference, factor, signed)]


def _saved_row(comparison: Comparison, saved: Paired) -> list[str]:
    title = METHOD_TITLES[comparison.method]
    return ["time saved %", title, _spread(saved, 100, ".1f"), "-", _interval(saved, 100, "+.1f")]


def _spread(spread: Spread, factor: float, form: str) -> str:
    return f"{factor * spread.mean:{form}} ± {factor * spread.sd:{form.lstrip('+')}}"


def _interval(paired: Paired, factor: float, form: str) -> str:
    return f"{factor * paired.low:{form}} .. {factor * paired.high:{form}}"
