"""``fastfreeze compare``: methods with the same seeds as a baseline, and their differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastfreeze.files import write_atomic
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.plot import Dots, plot_comparison, pyplot
from fastfreeze.recipes.report import CPU_NOTE, METHOD_TITLES, Report, Table, machine_note
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, run_all
from fastfreeze.recipes.train import TrainConfig

CONFIDENCE = 0.95
ENOUGH_SEEDS = 3  # for an interval
_NOTE = (
    "{n} seeds. difference: to {baseline} with the same seed, that is from the same weights and on "
    "the same batches.\n"
    "{interval}\n"
    "error and NLL: of the averaged probabilities of all snapshots where a method takes them, else "
    "of the last weights.\n"
    f"time: reading batches, training and saving snapshots. {CPU_NOTE} time saved: 1 - time / the "
    "baseline's, seed by seed."
)
_INTERVAL = (
    "mean ± standard deviation. 95% interval: of the mean difference or saving, by Student's t "
    "(degrees of freedom: {freedom})."
)
_NO_INTERVAL = (
    "Two seeds give no interval that tells anything: by Student's t it would reach 12.7 standard "
    "errors to each side. Take --seeds 3 or more."
)


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """What a comparison is asked to do: a training, of at least two seeds.

    Attributes:
        baseline: one of :data:`fastfreeze.recipes.names.METHOD_NAMES`, trained before ``methods``.
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
        """Train, from where it stopped, and write tables and picture; see :func:`run_all`."""
        optional_package("scipy.stats")  # before the training that it is for, as the next
        pyplot()
        results = run_all(self.experiment, data, run_dir, say, quiet)
        comparisons = compare(results, self.baseline)
        report = Report(
            comparison_table(comparisons, machine_note(results)),
            {
                "baseline": self.baseline,
                "confidence": CONFIDENCE,
                "comparison": [asdict(c) for c in comparisons],
                "results": results,
            },
        )
        report.write(run_dir)
        title = f"{self.model} on {self.data}, {self.epochs} epochs, {self.seeds} seeds"
        picture = plot_comparison(title, *panels(results, self.baseline))
        write_atomic(run_dir.path / "comparison.png", picture)
        return report


@dataclass(frozen=True)
class Spread:
    """Values of several seeds, in the seeds' order: mean, and standard deviation (n - 1)."""

    values: list[float]
    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of n >= 2 values."""
        return cls(list(values), float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class Paired(Spread):
    """Differences seed by seed, and an interval that holds their mean with 95% confidence.

    Attributes:
        low, high: None for fewer than three seeds, which give none that tells anything.
    """

    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Paired:
        """That of n >= 2 differences; Student's t, n - 1 degrees of freedom.

        Raises:
            RecipeError: SciPy is not installed.
        """
        spread, n = Spread.of(values), len(values)
        if n < ENOUGH_SEEDS:
            return cls(spread.values, spread.mean, spread.sd)
        t = float(optional_package("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1))
        half = t * spread.sd / math.sqrt(n)
        return cls(spread.values, spread.mean, spread.sd, spread.mean - half, spread.mean + half)


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
    error_difference: Paired | None
    nll: Spread
    nll_difference: Paired | None
    seconds: Spread
    cpu_seconds: Spread
    time_saved: Paired | None


def compare(results: Sequence[Line], baseline: str) -> list[Comparison]:
    """Each method's results beside the baseline's of the same seeds; the baseline comes first.

    Args:
        results: of every method with the same n >= 2 seeds.
        baseline: the name of one of the methods.
    """
    others = dict.fromkeys(r["method"] for r in results if r["method"] != baseline)
    return [_comparison(results, method, baseline) for method in (baseline, *others)]


def comparison_table(comparisons: Sequence[Comparison], machine: str = "") -> Table:
    """Each quantity of each method; the baseline is the first.

    Args:
        comparisons: as :func:`compare` gives them.
        machine: a last line of the note.
    """
    rows = [
        *(_row("error %", c, c.error, c.error_difference, 100, 2) for c in comparisons),
        *(_row("NLL", c, c.nll, c.nll_difference, 1, 4) for c in comparisons),
        *(_row("time s", c, c.seconds, None, 1, 1) for c in comparisons),
        *(_row("CPU s", c, c.cpu_seconds, None, 1, 1) for c in comparisons),
        *(_saved_row(c, c.time_saved) for c in comparisons if c.time_saved is not None),
    ]
    baseline = comparisons[0]
    headers = ["", "method", "mean", "difference", "95% interval"]
    interval = _INTERVAL.format(freedom=baseline.n - 1)
    if baseline.n < ENOUGH_SEEDS:
        headers[2:], rows = ["each seed", "difference"], [row[:-1] for row in rows]
        interval = _NO_INTERVAL
    title = METHOD_TITLES[baseline.method]
    return Table(
        headers, rows, _NOTE.format(n=baseline.n, baseline=title, interval=interval) + machine
    )


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
        Spread.of([a["cpu_seconds"] for a, _ in pairs]),
        paired(lambda a, b: 1 - a["seconds"] / b["seconds"]),
    )


def panels(results: Sequence[Line], baseline: str) -> tuple[Dots, Dots]:
    """The table as a picture."""
    methods = dict.fromkeys([baseline, *(result["method"] for result in results)])
    by_seed = sorted(results, key=lambda result: int(result["seed"]))

    def by_method(value: Callable[[Line], float]) -> dict[str, list[float]]:
        return {
            METHOD_TITLES[method]: [value(r) for r in by_seed if r["method"] == method]
            for method in methods
        }

    error = {"error": by_method(lambda r: 100 * _error(r))}
    cost = {
        "clock": by_method(lambda r: float(r["seconds"])),
        "CPU": by_method(lambda r: float(r["cpu_seconds"])),
    }
    return (
        Dots("test error % (dots: seeds, bar: mean)", 2, error),
        Dots("seconds of training", 1, cost),
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
    if len(spread.values) < ENOUGH_SEEDS:
        return ", ".join(f"{factor * value:{form}}" for value in spread.values)
    return f"{factor * spread.mean:{form}} ± {factor * spread.sd:{form.lstrip('+')}}"


def _interval(paired: Paired, factor: float, form: str) -> str:
    if paired.low is None or paired.high is None:
        return "-"
    return f"{factor * paired.low:{form}} .. {factor * paired.high:{form}}"
