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
    "mean ± standard deviation over n seeds. difference: to {baseline} with the same seed, that is "
    "from the same weights and on the same batches.\n"
    "95% interval: of the mean difference, by Student's t with n - 1 degrees of freedom.\n"
    "error and NLL: of the averaged probabilities of all snapshots where a method takes them, else "
    "of the last weights.\n"
    "time saved: 1 - time / the baseline's, seed by seed; reading batches, training and saving "
    "snapshots."
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
            comparison_table(comparisons, self.baseline),
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


def comparison_table(comparisons: Sequence[Comparison], baseline: str) -> Table:
    """A row per method; errors and time in percent."""
    headers = ["method", "n", "error %", "difference", "95% interval"]
    headers += ["NLL", "difference", "95% interval", "time s", "time saved %", "95% interval"]
    rows = [
        [
            METHOD_TITLES[c.method],
            str(c.n),
            _spread(c.error, 100, 2),
            *_paired(c.error_difference, 100, 2),
            _spread(c.nll, 1, 4),
            *_paired(c.nll_difference, 1, 4),
            _spread(c.seconds, 1, 1),
            *_paired(c.time_saved, 100, 1),
        ]
        for c in comparisons
    ]
    return Table(headers, rows, _NOTE.format(baseline=METHOD_TITLES[baseline]))


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


def _spread(spread: Spread, factor: float, digits: int) -> str:
    return f"{factor * spread.mean:.{digits}f} ± {factor * spread.sd:.{digits}f}"


def _paired(paired: Paired | None, factor: float, digits: int) -> tuple[str, str]:
    if paired is None:
        return "-", "-"
    low, high = factor * paired.low, factor * paired.high
    mean = f"{factor * paired.mean:+.{digits}f} ± {factor * paired.sd:.{digits}f}"
    return mean, f"{low:+.{digits}f} .. {high:+.{digits}f}"
