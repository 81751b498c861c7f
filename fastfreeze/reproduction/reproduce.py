"""``fastfreeze reproduce``: a row of a paper, run with the paper's budget, beside its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastfreeze.files import write_atomic
from fastfreeze.recipes.data import ImageData, balanced, load_data
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.plot import Bars, Curves, Panel, plot_reproduction
from fastfreeze.recipes.report import (
    CPU_NOTE,
    METHOD_TITLES,
    Report,
    Table,
    cell,
    machine_note,
)
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, run_all
from fastfreeze.recipes.training import Method
from fastfreeze.reproduction.budget import Budget, scaled
from fastfreeze.reproduction.papers import (
    FREEZEOUT_T_0S,
    INITIAL_LR,
    SNAPSHOT_LRS,
    FreezeOutRow,
    Row,
    SnapshotRow,
    freezeout_rows,
    snapshot_rows,
)
from fastfreeze.schedule import Cosine, FreezeOut, SnapshotCycles, StepDecay


@dataclass(frozen=True)
class ReproduceConfig(ABC):
    """What a reproduction is asked to do.

    Attributes:
        model, data: of one of :meth:`rows`.
        scale: share of the paper's budget, in (0, 1]; see :func:`~fastfreeze.reproduction.budget.scaled`.
        test_images: test on so many, as many of each class as can be; None for all.
        seed, seeds: the first seed, and how many from there on.
        device: "cpu" or "cuda:<n>".
        threads: torch's threads.
    """

    model: str
    data: str
    scale: float
    test_images: int | None
    seed: int
    seeds: int
    device: str
    threads: int

    paper: ClassVar[str]

    @staticmethod
    @abstractmethod
    def rows() -> Sequence[Row]:
        """What can be run."""

    @abstractmethod
    def methods(self) -> tuple[Method, ...]:
        """The trainings of each seed."""

    @abstractmethod
    def table(self, results: Sequence[Line], note: str) -> Table:
        """Ours beside the paper's."""

    @abstractmethod
    def values(self, results: Sequence[Line]) -> list[Line]:
        """The table as plain data."""

    @abstractmethod
    def panels(self, results: Sequence[Line]) -> tuple[Panel, Panel]:
        """The table as pictures."""

    @classmethod
    def find(cls, model: str, data: str) -> Row:
        """What the paper says of a network on a data set.

        Raises:
            ValueError: it has no such row; the message lists those that it has.
        """
        known: dict[str, list[str]] = {}
        for row in cls.rows():
            if (row.model, row.data) == (model, data):
                return row
            known.setdefault(row.model, []).append(row.data)
        listed = "; ".join(f"{model} on {', '.join(sets)}" for model, sets in known.items())
        raise ValueError(f"{cls.paper} has no row for {model} on {data}; there are: {listed}")

    @property
    def row(self) -> Row:
        """What the paper says."""
        return self.find(self.model, self.data)

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        """All images, from the files in ``data_dir``, read by so many processes."""
        return load_data(self.data, data_dir, workers=workers)

    def budget(self, data: ImageData) -> Budget:
        """How much of the paper's training is run.

        Raises:
            ValueError: there are fewer test images than ``test_images``.
        """
        all_tested = len(data.test.labels)
        tested = all_tested if self.test_images is None else self.test_images
        if tested > all_tested:
            raise ValueError(f"test_images must be in 1..{all_tested}, got {tested}")
        num_images = len(data.train.labels)
        return scaled(self.row, self.scale, num_images, data.num_classes, tested, all_tested)

    def experiment(self, budget: Budget) -> Experiment:
        """The trainings that this asks for."""
        row = self.row
        return Experiment(
            self.methods(),
            row.network,
            budget.epochs,
            row.batch_size,
            range(self.seed, self.seed + self.seeds),
            self.device,
            row.stem_stride,
        )

    def check(self, data: ImageData) -> None:
        """Raise ValueError where values that are fine alone do not fit together."""
        budget = self.budget(data)
        self.experiment(budget).check(_part(data, budget))

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Report:
        """Train, from where it stopped, and write table and picture; see :func:`run_all`."""
        optional_package("matplotlib")  # before the training that its picture is of
        budget, row = self.budget(data), self.row
        say(str(budget))
        results = run_all(self.experiment(budget), _part(data, budget), run_dir, say, quiet)
        title = f"{row.title} on {row.data}: {budget}."
        report = Report(
            self.table(results, title),
            {
                "paper": self.paper,
                "row": asdict(row),
                "budget": budget.values(),
                "table": self.values(results),
                "results": results,
            },
        )
        report.write(run_dir)
        picture = plot_reproduction(run_dir, title, self.panels(results))
        write_atomic(run_dir.path / "reproduction.png", picture)
        return report


@dataclass(frozen=True)
class SnapshotConfig(ReproduceConfig):
    """A row of table 1 of Snapshot Ensembles."""

    paper: ClassVar[str] = "Snapshot Ensembles, table 1"

    @staticmethod
    def rows() -> Sequence[SnapshotRow]:
        return snapshot_rows()

    @property
    def row(self) -> SnapshotRow:
        row = super().row
        assert isinstance(row, SnapshotRow)
        return row

    def methods(self) -> tuple[Method, ...]:
        cycles = self.row.cycles
        single = Method("single", INITIAL_LR, partial(StepDecay, num_cycles=cycles))
        cyclic = partial(SnapshotCycles, num_cycles=cycles)
        return single, *(Method(f"snapshot-{lr}", lr, cyclic) for lr in SNAPSHOT_LRS)

    def values(self, results: Sequence[Line]) -> list[Line]:
        errors = self.row.errors or {}
        return [
            {
                "column": column,
                "error": [result[key] for result in _of(results, method)],
                "paper_error": errors.get(column),
                "lr": next(m.lr for m in self.methods() if m.name == method),
                "seconds": [result["seconds"] for result in _of(results, method)],
                "cpu_seconds": [result["cpu_seconds"] for result in _of(results, method)],
            }
            for column, method, key in _SNAPSHOT_COLUMNS
        ]

    def table(self, results: Sequence[Line], note: str) -> Table:
        rows = [
            [
                COLUMN_TITLES[value["column"]],
                cell([100 * error for error in value["error"]], 2),
                "-" if value["paper_error"] is None else f"{100 * value['paper_error']:.2f}",
                f"{value['lr']:g}",
                cell(value["seconds"], 1),
                cell(value["cpu_seconds"], 1),
            ]
            for value in self.values(results)
        ]
        return Table(
            ["method", "error %", "paper %", "lr", "time s", "CPU s"],
            rows,
            f"{note}\nThe single model and NoCycle are one training: a tenth of the rate after a "
            f"half and three quarters of it.\nNoCycle and Snapshot: the mean probabilities of "
            f"{self.row.cycles} snapshots, at the same steps.\n{CPU_NOTE}{machine_note(results)}",
        )

    def panels(self, results: Sequence[Line]) -> tuple[Panel, Panel]:
        values = self.values(results)
        bars = Bars(
            "error %",
            [COLUMN_TITLES[value["column"]] for value in values],
            [100 * float(np.mean(value["error"])) for value in values],
            [value["paper_error"] and 100 * value["paper_error"] for value in values],
        )
        curves = {}
        for column, method, key in _SNAPSHOT_COLUMNS:
            if key == "ensemble_error":
                errors = [result["last_k_errors"] for result in _of(results, method)]
                curves[COLUMN_TITLES[column]] = (100 * np.mean(errors, axis=0)).tolist()
        return bars, Curves("last snapshots in the ensemble", "error %", curves)


# Column of the paper's table, the training that gives it, and where in its result.
_SNAPSHOT_COLUMNS = (
    ("single", "single", "error"),
    ("nocycle", "single", "ensemble_error"),
    *((f"snapshot-{lr}", f"snapshot-{lr}", "ensemble_error") for lr in SNAPSHOT_LRS),
)
COLUMN_TITLES = {
    **METHOD_TITLES,
    "single": "single model",
    "nocycle": "NoCycle",
}


@dataclass(frozen=True)
class FreezeOutConfig(ReproduceConfig):
    """A network of FreezeOut, without freezing and with the authors' schedules."""

    paper: ClassVar[str] = "FreezeOut"

    @staticmethod
    def rows() -> Sequence[FreezeOutRow]:
        return freezeout_rows()

    @property
    def row(self) -> FreezeOutRow:
        row = super().row
        assert isinstance(row, FreezeOutRow)
        return row

    def methods(self) -> tuple[Method, ...]:
        freezing = (
            Method(f"freezeout-{t_0}", INITIAL_LR, partial(FreezeOut, t_0=t_0))
            for t_0 in FREEZEOUT_T_0S
        )
        return Method("sgd", INITIAL_LR, Cosine), *freezing

    def values(self, results: Sequence[Line]) -> list[Line]:
        plain = _of(results, "sgd")
        found = []
        for method in self.methods():
            own, freezes = _of(results, method.name), method.name != "sgd"
            pairs = list(zip(own, plain, strict=True))
            found.append(
                {
                    "method": method.name,
                    "error": [result["error"] for result in own],
                    "relative_loss": [_relative_loss(*pair) for pair in pairs] if freezes else None,
                    "paper_relative_loss": self.row.relative_loss if freezes else None,
                    "time_saved": [_time_saved(*pair) for pair in pairs] if freezes else None,
                    "paper_time_saved": self.row.time_saved if freezes else None,
                    "seconds": [result["seconds"] for result in own],
                    "cpu_seconds": [result["cpu_seconds"] for result in own],
                }
            )
        return found

    def table(self, results: Sequence[Line], note: str) -> Table:
        def percent(values: list[float] | float | None) -> str:
            if values is None:
                return "-"
            if isinstance(values, float):
                return f"{100 * values:.0f}"
            return cell([100 * value for value in values], 1)

        rows = [
            [
                METHOD_TITLES[value["method"]],
                cell([100 * error for error in value["error"]], 2),
                percent(value["relative_loss"]),
                percent(value["paper_relative_loss"]),
                cell(value["seconds"], 1),
                cell(value["cpu_seconds"], 1),
                percent(value["time_saved"]),
                percent(value["paper_time_saved"]),
            ]
            for value in self.values(results)
        ]
        headers = ["method", "error %", "accuracy lost %", "paper", "time s", "CPU s"]
        claim = f"\nThe paper: {self.row.claim}." if self.row.claim else ""
        return Table(
            [*headers, "time saved %", "paper"],
            rows,
            f"{note}{claim}\nFreezeOut: cubic, scaled. Accuracy lost and time saved: relative to "
            f"plain SGD with the same seed.\n{CPU_NOTE}{machine_note(results)}",
        )

    def panels(self, results: Sequence[Line]) -> tuple[Panel, Panel]:
        values = self.values(results)
        errors = Bars(
            "error %",
            [METHOD_TITLES[value["method"]] for value in values],
            [100 * float(np.mean(value["error"])) for value in values],
            [None] * len(values),
        )
        freezing = values[1:]
        saved = Bars(
            "time saved %",
            [METHOD_TITLES[value["method"]] for value in freezing],
            [100 * float(np.mean(value["time_saved"])) for value in freezing],
            [None if self.row.time_saved is None else 100 * self.row.time_saved for _ in freezing],
        )
        return errors, saved


def _part(data: ImageData, budget: Budget) -> ImageData:
    """The images of a budget."""
    if budget.tested < budget.all_tested:
        chosen = balanced(data.test.labels, budget.tested)
        data = replace(data, test=data.test.part(chosen))
    return data if budget.images == budget.all_images else data.part(budget.images)


def _of(results: Sequence[Line], method: str) -> list[Line]:
    """A method's results, by seed."""
    return [result for result in results if result["method"] == method]


def _relative_loss(result: Line, plain: Line) -> float:
    """Accuracy lost, as a share of that without freezing; 0 where there is none to lose."""
    accuracy = 1 - plain["error"]
    return (result["error"] - plain["error"]) / accuracy if accuracy > 0 else 0.0


def _time_saved(result: Line, plain: Line) -> float:
    return 1 - float(result["seconds"]) / float(plain["seconds"])
