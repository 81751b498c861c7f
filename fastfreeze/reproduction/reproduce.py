"""``fastfreeze reproduce``: a row of a paper, run with the paper's budget, beside its numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, RunConfig
from fastfreeze.recipes.tables import (
    CPU_NOTE,
    ERROR,
    METHOD_TITLES,
    TIMES,
    Table,
    by_method,
    cells,
    titles,
)
from fastfreeze.recipes.training import Method
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
class Budget:
    """The length of a training, and beside it the paper's.

    Attributes:
        epochs, images: passes over so many training images.
        tested: test images.
        paper_epochs, all_images, all_tested: the same of a whole training.
        paper_data: whether the paper has a number for this data set.
    """

    epochs: int
    images: int
    paper_epochs: int
    all_images: int
    tested: int
    all_tested: int
    paper_data: bool

    @property
    def share(self) -> float:
        """Part of the paper's budget, in 0..1: images seen, over those that it would see."""
        return self.epochs * self.images / (self.paper_epochs * self.all_images)

    @property
    def comparable(self) -> bool:
        """Whether ours may be held against the paper's numbers."""
        return self.share == 1 and self.tested == self.all_tested and self.paper_data

    def __str__(self) -> str:
        part = "" if self.share == 1 else f"{100 * self.share:.2g}% of "
        epochs = "epoch" if self.epochs == 1 else "epochs"
        words = f"{part}the paper's budget: {self.epochs:,} {epochs} of {self.images:,} images"
        if self.tested < self.all_tested:
            words += f"; tested on {self.tested:,} of {self.all_tested:,} images"
        if not self.paper_data:
            words += "; the paper has no such data"
        return words if self.comparable else f"{words}; not comparable"

    def values(self) -> Line:
        """The same as plain data."""
        derived = {"share": self.share, "comparable": self.comparable, "words": str(self)}
        return {**asdict(self), **derived}


def scaled(
    row: Row, scale: float, num_images: int, num_classes: int, tested: int, all_tested: int
) -> Budget:
    """The budget of a row times ``scale``, in (0, 1]: fewer epochs, then fewer images in each.

    All cycles have the same number of epochs, at least one, and there is at least one image of each
    class. No epoch ends in a batch of one image, on which norms cannot train.
    """
    wanted = round(scale * row.epochs, 9)  # else 0.1 * 30 would be more than 3
    epochs = min(row.epochs, row.cycles * math.ceil(wanted / row.cycles))
    images = max(num_classes, min(num_images, round(num_images * wanted / epochs)))
    if images > row.batch_size and images % row.batch_size == 1:
        images -= 1
    return Budget(epochs, images, row.epochs, num_images, tested, all_tested, row.in_paper)


@dataclass(frozen=True)
class ReproduceConfig(RunConfig):
    """What a reproduction is asked to do: ``model`` and ``data`` are of one of :attr:`rows`.

    Attributes:
        scale: share of the paper's budget, in (0, 1]; see :func:`scaled`.
        test_images: test on so many, as many of each class as can be; None for all.
    """

    scale: float
    test_images: int | None

    paper: ClassVar[str]
    rows: ClassVar[Sequence[Row]]

    @abstractmethod
    def methods(self) -> tuple[Method, ...]:
        """The trainings of each seed."""

    @abstractmethod
    def table(self, results: Sequence[Line], note: str) -> Table:
        """Ours beside the paper's."""

    @property
    def row(self) -> Row:
        """What the paper says of the network on the data set.

        Raises:
            ValueError: it has no such row; the message lists those that it has.
        """
        known: dict[str, list[str]] = {}
        for row in self.rows:
            if (row.model, row.data) == (self.model, self.data):
                return row
            known.setdefault(row.model, []).append(row.data)
        listed = "; ".join(f"{model} on {', '.join(sets)}" for model, sets in known.items())
        asked = f"{self.model} on {self.data}"
        raise ValueError(f"{self.paper} has no row for {asked}; there are: {listed}")

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        return load_data(self.row.data, data_dir, workers=workers)

    def budget(self, data: ImageData) -> Budget:
        """How much of the paper's training is run."""
        num_images, all_tested = len(data.train.labels), len(data.test.labels)
        tested = self.test_images or all_tested
        return scaled(self.row, self.scale, num_images, data.num_classes, tested, all_tested)

    def experiment(self, data: ImageData) -> Experiment:
        row, budget = self.row, self.budget(data)
        return Experiment(
            self.methods(),
            row.network,
            data.part(budget.images, budget.tested),
            budget.epochs,
            row.batch_size,
            self.device,
            row.stem_stride,
        )

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> tuple[Table, Line]:
        say(str(self.budget(data)))
        return super().run(data, run_dir, say, quiet)

    def outcome(self, results: Sequence[Line], data: ImageData) -> tuple[Table, Line]:
        budget, row = self.budget(data), self.row
        table = self.table(results, f"{row.title} on {row.data}: {budget}.")
        return table, {"paper": self.paper, "row": asdict(row), "budget": budget.values()}


@dataclass(frozen=True)
class SnapshotConfig(ReproduceConfig):
    """A row of table 1 of Snapshot Ensembles."""

    paper = "Snapshot Ensembles, table 1"
    rows = snapshot_rows()

    def methods(self) -> tuple[Method, ...]:
        cycles = self.row.cycles
        single = Method("single", INITIAL_LR, partial(StepDecay, num_cycles=cycles))
        cyclic = partial(SnapshotCycles, num_cycles=cycles)
        return single, *(Method(f"snapshot-{lr}", lr, cyclic) for lr in SNAPSHOT_LRS)

    def table(self, results: Sequence[Line], note: str) -> Table:
        paper, found, rows = self.row.errors or {}, by_method(results), []

        def add(title: str, column: str, method: str, key: str, lr: float) -> None:
            said = f"{100 * paper[column]:.2f}" if paper else "-"
            error = cells(found[method], [("", key, 100, 2)])
            rows.append([title, *error, said, f"{lr:g}", *cells(found[method], TIMES)])

        add("single model", "single", "single", "error", INITIAL_LR)
        add("NoCycle", "nocycle", "single", "ensemble_error", INITIAL_LR)
        for lr in SNAPSHOT_LRS:
            method = f"snapshot-{lr}"
            add(METHOD_TITLES[method], method, method, "ensemble_error", lr)
        return Table(
            ["method", "error %", "paper %", "lr", *titles(TIMES)],
            rows,
            f"{note}\nThe single model and NoCycle are one training: a tenth of the rate after a "
            f"half and three quarters of it.\nNoCycle and Snapshot: the mean probabilities of "
            f"{self.row.cycles} snapshots, at the same steps.\n{CPU_NOTE}",
        )


@dataclass(frozen=True)
class FreezeOutConfig(ReproduceConfig):
    """A network of FreezeOut, without freezing and with the authors' schedules."""

    paper = "FreezeOut"
    rows = freezeout_rows()

    def methods(self) -> tuple[Method, ...]:
        freezing = (
            Method(f"freezeout-{t_0}", INITIAL_LR, partial(FreezeOut, t_0=t_0))
            for t_0 in FREEZEOUT_T_0S
        )
        return Method("sgd", INITIAL_LR, Cosine), *freezing

    def table(self, results: Sequence[Line], note: str) -> Table:
        found, row = by_method(results), self.row
        plain = found["sgd"]
        rows = [["plain SGD", *cells(plain, [ERROR]), "-", "-", *cells(plain, TIMES), "-", "-"]]
        for t_0 in FREEZEOUT_T_0S:
            method = f"freezeout-{t_0}"
            own = found[method]
            beside = [_beside(*pair) for pair in zip(own, plain, strict=True)]
            lost, saved = cells(beside, [("", "lost", 100, 1), ("", "saved", 100, 1)])
            error = [*cells(own, [ERROR]), lost, _percent(row.relative_loss)]
            time = [*cells(own, TIMES), saved, _percent(row.time_saved)]
            rows.append([METHOD_TITLES[method], *error, *time])
        headers = ["method", "error %", "accuracy lost %", "paper", *titles(TIMES)]
        claim = f"\nThe paper: {row.claim}." if row.claim else ""
        return Table(
            [*headers, "time saved %", "paper"],
            rows,
            f"{note}{claim}\nFreezeOut: cubic, scaled. Accuracy lost and time saved: relative to "
            f"plain SGD with the same seed.\n{CPU_NOTE}",
        )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _beside(own: Line, plain: Line) -> Line:
    """Time saved, and accuracy lost as a share of that without freezing, 0 where there is none."""
    accuracy = 1 - plain["error"]
    lost = (own["error"] - plain["error"]) / accuracy if accuracy > 0 else 0.0
    return {"lost": lost, "saved": 1 - own["seconds"] / plain["seconds"]}
