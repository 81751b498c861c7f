"""What a command that trains is asked to do, and how it is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.rundir import Line, RunDir
from fastfreeze.recipes.runs import Experiment, run_all
from fastfreeze.recipes.tables import Outcome


@dataclass(frozen=True)
class RunConfig(ABC):
    """What a run is asked to do; the fields are the command's options.

    Attributes:
        model: as in :func:`fastfreeze.recipes.networks.build_network`.
        data: as in :func:`fastfreeze.recipes.data.load_data`.
        seed, seeds: the first seed, and how many from there on.
        device: "cpu" or "cuda:<n>".
        threads: torch's threads.
    """

    model: str
    data: str
    seed: int
    seeds: int
    device: str
    threads: int

    @property
    def all_seeds(self) -> range:
        """The seeds of each method's trainings."""
        return range(self.seed, self.seed + self.seeds)

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

    def told(self, data: ImageData) -> str:
        """What is said before the first step, if anything."""
        return ""

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
        """Train, from where it stopped, and write the table; see :func:`run_all`."""
        told = self.told(data)
        if told:
            say(told)
        results = run_all(self.experiment(data), self.part(data), run_dir, say, quiet)
        outcome = self.outcome(results, data)
        outcome.write(run_dir)
        return outcome
