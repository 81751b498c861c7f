"""``fastfreeze reproduce``: a row of a paper, run with the paper's budget, beside its numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from fastfreeze.checks import check_int
from fastfreeze.recipes.config import RunConfig
from fastfreeze.recipes.data import ImageData, balanced, load_data
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment
from fastfreeze.recipes.tables import CPU_NOTE, METHOD_TITLES, Outcome, Table, cell
from fastfreeze.recipes.training import Method
from fastfreeze.reproduction.budget import Budget, scaled
from fastfreeze.reproduction.papers import (
    FREEZEOUT_T_0S,
    INITIAL_LR,
    SNAPSHOT_LRS,
    Row,
    freezeout_rows,
    snapshot_rows,
)
from fastfreeze.schedule import Cosine, FreezeOut, SnapshotCycles, StepDecay


@dataclass(frozen=True)
class ReproduceConfig(RunConfig):
    """What a reproduction is asked to do: ``model`` and ``data`` are of one of :meth:`rows`.

    Attributes:
        scale: share of the paper's budget, in (0, 1]; see
            :func:`fastfreeze.reproduction.budget.scaled`.
        test_images: test on so many, as many of each class as can be; None for all.
    """

    scale: float
    test_images: int | None

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
        return load_data(self.data, data_dir, workers=workers)

    def budget(self, data: ImageData) -> Budget:
        """How much of the paper's training is run.

        Raises:
            ValueError: there are fewer test images than ``test_images``.
        """
        all_tested = len(data.test.labels)
        tested = all_tested if self.test_images is None else self.test_images
        check_int("test_images", tested, minimum=1, maximum=all_tested)
        num_images = len(data.train.labels)
        return scaled(self.row, self.scale, num_images, data.num_classes, tested, all_tested)

    def experiment(self, data: ImageData) -> Experiment:
        row = self.row
        return Experiment(
            self.methods(),
            row.network,
            self.budget(data).epochs,
            row.batch_size,
            self.device,
            row.stem_stride,
        )

    def part(self, data: ImageData) -> ImageData:
        budget = self.budget(data)
        if budget.tested < budget.all_tested:
            chosen = balanced(data.test.labels, budget.tested)
            data = replace(data, test=data.test.part(chosen))
        return data if budget.images == budget.all_images else data.part(budget.images)

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Outcome:
        say(str(self.budget(data)))
        return super().run(data, run_dir, say, quiet)

    def outcome(self, results: Sequence[Line], data: ImageData) -> Outcome:
        budget, row = self.budget(data), self.row
        table = self.table(results, f"{row.title} on {row.data}: {budget}.")
        values = {"paper": self.paper, "row": asdict(row), "budget": budget.values()}
        return Outcome(table, {**values, "results": results})


@dataclass(frozen=True)
class SnapshotConfig(ReproduceConfig):
    """A row of table 1 of Snapshot Ensembles."""

    paper: ClassVar[str] = "Snapshot Ensembles, table 1"

    @staticmethod
    def rows() -> Sequence[Row]:
        return snapshot_rows()

    def methods(self) -> tuple[Method, ...]:
        cycles = self.row.cycles
        single = Method("single", INITIAL_LR, partial(StepDecay, num_cycles=cycles))
        cyclic = partial(SnapshotCycles, num_cycles=cycles)
        return single, *(Method(f"snapshot-{lr}", lr, cyclic) for lr in SNAPSHOT_LRS)

    def table(self, results: Sequence[Line], note: str) -> Table:
        rates = {method.name: method.lr for method in self.methods()}
        rows = []
        for column, method, key in _SNAPSHOT_COLUMNS:
            own, paper = _of(results, method), (self.row.errors or {}).get(column)
            error = cell([100 * result[key] for result in own], 2)
            said = "-" if paper is None else f"{100 * paper:.2f}"
            rows.append([_TITLES[column], error, said, f"{rates[method]:g}", *_times(own)])
        return Table(
            ["method", "error %", "paper %", "lr", "time s", "CPU s"],
            rows,
            f"{note}\nThe single model and NoCycle are one training: a tenth of the rate after a "
            f"half and three quarters of it.\nNoCycle and Snapshot: the mean probabilities of "
            f"{self.row.cycles} snapshots, at the same steps.\n{CPU_NOTE}",
        )


# Column of the paper's table, the training that gives it, and where in its result.
_SNAPSHOT_COLUMNS = (
    ("single", "single", "error"),
    ("nocycle", "single", "ensemble_error"),
    *((f"snapshot-{lr}", f"snapshot-{lr}", "ensemble_error") for lr in SNAPSHOT_LRS),
)
_TITLES = {**METHOD_TITLES, "single": "single model", "nocycle": "NoCycle"}


@dataclass(frozen=True)
class FreezeOutConfig(ReproduceConfig):
    """A network of FreezeOut, without freezing and with the authors' schedules."""

    paper: ClassVar[str] = "FreezeOut"

    @staticmethod
    def rows() -> Sequence[Row]:
        return freezeout_rows()

    def methods(self) -> tuple[Method, ...]:
        freezing = (
            Method(f"freezeout-{t_0}", INITIAL_LR, partial(FreezeOut, t_0=t_0))
            for t_0 in FREEZEOUT_T_0S
        )
        return Method("sgd", INITIAL_LR, Cosine), *freezing

    def table(self, results: Sequence[Line], note: str) -> Table:
        plain = _of(results, "sgd")
        rows = [["plain SGD", _errors(plain), "-", "-", *_times(plain), "-", "-"]]
        for t_0 in FREEZEOUT_T_0S:
            own = _of(results, f"freezeout-{t_0}")
            pairs = list(zip(own, plain, strict=True))
            rows.append(
                [
                    METHOD_TITLES[f"freezeout-{t_0}"],
                    _errors(own),
                    cell([100 * _relative_loss(*pair) for pair in pairs], 1),
                    _percent(self.row.relative_loss),
                    *_times(own),
                    cell([100 * (1 - a["seconds"] / b["seconds"]) for a, b in pairs], 1),
                    _percent(self.row.time_saved),
                ]
            )
        headers = ["method", "error %", "accuracy lost %", "paper", "time s", "CPU s"]
        claim = f"\nThe paper: {self.row.claim}." if self.row.claim else ""
        return Table(
            [*headers, "time saved %", "paper"],
            rows,
            f"{note}{claim}\nFreezeOut: cubic, scaled. Accuracy lost and time saved: relative to "
            f"plain SGD with the same seed.\n{CPU_NOTE}",
        )


def _of(results: Sequence[Line], method: str) -> list[Line]:
    """A method's results, by seed."""
    return [result for result in results if result["method"] == method]


def _errors(results: Sequence[Line]) -> str:
    return cell([100 * result["error"] for result in results], 2)


def _times(results: Sequence[Line]) -> list[str]:
    return [cell([result[key] for result in results], 1) for key in ("seconds", "cpu_seconds")]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _relative_loss(result: Line, plain: Line) -> float:
    """Accuracy lost, as a share of that without freezing; 0 where there is none to lose."""
    accuracy = 1 - plain["error"]
    return (result["error"] - plain["error"]) / accuracy if accuracy > 0 else 0.0
