"""What a command that trains is asked to do, and how it is done."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, Run
from fastfreeze.recipes.tables import Outcome


@dataclass(frozen=True)
class RunConfig(ABC):
    """What a run is asked to do; the fields are the command's options."""

    model: str
    data: str
    seed: int
    seeds: int
    device: str
    threads: int

    @abstractmethod
    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        """The images, from the files in ``data_dir``, read by so many processes."""

    @abstractmethod
    def experiment(self, data: ImageData) -> Experiment:
        """The trainings that this asks for.

        Raises:
            RecipeError: the network cannot be built or split.
        """

    @abstractmethod
    def outcome(self, results: Sequence[Line], data: ImageData) -> Outcome:
        """What the trainings have come to."""

    def part(self, data: ImageData) -> ImageData:
        """What is trained and tested on."""
        return data

    def check(self, data: ImageData) -> None:
        """See that all can be trained and told, before the first step.

        Raises:
            ValueError: values that are fine alone do not fit together.
            RecipeError: a package is missing, or see :meth:`Experiment.check`.
        """
        self.experiment(data).check(self.part(data))

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Outcome:
        """Train each method with each seed, from where it stopped, and write the table.

        ``say`` takes a line for each training, and for each tenth where no progress bar is shown;
        ``quiet`` shows none.

        Raises:
            RecipeError: see :class:`Run`, or another process writes to the directory.
        """
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        experiment, part = self.experiment(data), self.part(data)
        run_dir.rewind()
        finished = {(r["method"], r["seed"]) for r in run_dir.results()}
        for seed in range(self.seed, self.seed + self.seeds):
            for method in experiment.methods:
                if (method.name, seed) not in finished:
                    gc.collect()  # the network before holds itself in a circle
                    Run(method, seed, experiment, part, run_dir, say).finish(quiet)
        outcome = self.outcome(run_dir.results(), data)
        outcome.write(run_dir)
        return outcome
