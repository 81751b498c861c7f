"""``fastfreeze train`` and ``compare``: the papers' methods, both together, and plain SGD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastfreeze.recipes.advice import advice
from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.rundir import Line
from fastfreeze.recipes.runs import Experiment, RunConfig
from fastfreeze.recipes.tables import CONFIDENCE, Table, compare, comparison_table, results_table
from fastfreeze.recipes.training import Method
from fastfreeze.schedule import (
    Composition,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    HowScale,
    Schedule,
    SnapshotCycles,
)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What a run is asked to do: the options of ``fastfreeze train``."""

    methods: tuple[str, ...]
    image_size: int
    epochs: int
    batch_size: int
    lr: float
    t_0: float
    how_scale: HowScale
    cycles: int
    composition: Composition
    last_k: int

    def schedule(self, method: str, total_steps: int) -> Schedule:
        """A method's; ValueError where the configuration and the number of steps do not fit."""
        if method == "sgd":
            return Cosine(total_steps)
        if method == "freezeout":
            return FreezeOut(total_steps, t_0=self.t_0, how_scale=self.how_scale)
        if method == "snapshot":
            return SnapshotCycles(total_steps, num_cycles=self.cycles)
        return FreezeOutCycles(
            total_steps,
            num_cycles=self.cycles,
            t_0=self.t_0,
            how_scale=self.how_scale,
            composition=self.composition,
            k=self.last_k if self.composition == "last_k" else None,
        )

    def trained(self) -> Iterable[str]:
        """The names of the methods, in the order of their trainings."""
        return self.methods

    def experiment(self, data: ImageData) -> Experiment:
        methods = tuple(Method(m, self.lr, partial(self.schedule, m)) for m in self.trained())
        return Experiment(methods, self.model, data, self.epochs, self.batch_size, self.device)

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        return load_data(self.data, data_dir, workers=workers, image_size=self.image_size)

    def outcome(self, results: Sequence[Line], data: ImageData) -> tuple[Table, Line]:
        told = advice(results, self.epochs, len(data.test.labels))
        return results_table(results, told), {"advice": told}


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
