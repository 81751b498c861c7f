"""``fastfreeze train``: the two papers' methods, both together, and plain SGD beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.report import Report, results_table
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.recipes.runs import Experiment, run_all
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
class TrainConfig:
    """What a run is asked to do.

    Attributes:
        methods: of :data:`fastfreeze.recipes.names.METHOD_NAMES`, in the order in which they run.
        data, image_size: as in :func:`fastfreeze.recipes.data.load_data`.
        model: as in :func:`fastfreeze.recipes.networks.build_network`.
        epochs, batch_size: length of the run, and images in a step; >= 1.
        lr: learning rate at the start, > 0.
        t_0, how_scale: FreezeOut's parameters, for "freezeout" and "both".
        cycles: snapshots, for "snapshot" and "both".
        composition, last_k: how "both" freezes; ``last_k`` counts for "last_k" alone.
        seed, seeds: the first seed, and how many from there on.
        device: "cpu" or "cuda:<n>".
        threads: torch's threads.
    """

    methods: tuple[str, ...]
    data: str
    image_size: int
    model: str
    epochs: int
    batch_size: int
    lr: float
    t_0: float
    how_scale: HowScale
    cycles: int
    composition: Composition
    last_k: int
    seed: int
    seeds: int
    device: str
    threads: int

    def schedule(self, method: str, total_steps: int) -> Schedule:
        """The schedule of a method.

        Raises:
            ValueError: the configuration and the number of steps do not fit together.
        """
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

    @property
    def experiment(self) -> Experiment:
        """The trainings that this asks for."""
        return self.training(self.methods)

    def training(self, methods: Iterable[str]) -> Experiment:
        """Those of some methods."""
        return Experiment(
            tuple(Method(name, self.lr, partial(self.schedule, name)) for name in methods),
            self.model,
            self.epochs,
            self.batch_size,
            range(self.seed, self.seed + self.seeds),
            self.device,
        )

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        """The images, from the files in ``data_dir``, read by so many processes."""
        return load_data(self.data, data_dir, workers=workers, image_size=self.image_size)

    def check(self, data: ImageData) -> None:
        """Raise ValueError where values that are fine alone do not fit together."""
        self.experiment.check(data)

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Report:
        """Train, from where it stopped, and write the tables; see :func:`run_all`."""
        results = run_all(self.experiment, data, run_dir, say, quiet)
        report = Report(results_table(results), {"results": results})
        report.write(run_dir)
        return report
