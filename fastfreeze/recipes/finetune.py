"""``fastfreeze finetune``: a pretrained network for images of one's own, most of it frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.errors import optional_package
from fastfreeze.recipes.networks import is_own, layers_of, outline
from fastfreeze.recipes.plot import plot_run
from fastfreeze.recipes.report import Report, finetune_table
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.recipes.runs import Experiment, run_all
from fastfreeze.recipes.training import Method, fine_tuning
from fastfreeze.schedule import Cosine, FreezeOut, Frozen, GradualUnfreezing, Schedule


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning is asked to do.

    Attributes:
        recipe: of :data:`fastfreeze.recipes.names.RECIPE_NAMES`.
        optimizer: "adamw" or "sgd".
        data, image_size: as in :func:`fastfreeze.recipes.data.load_data`.
        model: as in :func:`fastfreeze.recipes.networks.build_network`.
        weights: the file of all but the head's; None for a user's own network, which has its own.
        epochs, batch_size: length of the run, and images in a step; >= 1.
        lr: learning rate at the start, > 0.
        until: as in :class:`fastfreeze.schedule.Frozen`, for "prefix".
        t_0: as in :class:`fastfreeze.schedule.FreezeOut`, for "freezeout".
        warmup_steps: steps over which the rates rise.
        validation: share of each class's training images that is held out, in (0, 1).
        augment: whether training images are varied.
        seed, seeds: the first seed, and how many from there on.
        device: "cpu" or "cuda:<n>".
        threads: torch's threads.
    """

    recipe: str
    optimizer: str
    data: str
    image_size: int
    model: str
    weights: str | None
    epochs: int
    batch_size: int
    lr: float
    until: int | str | float
    t_0: float
    warmup_steps: int
    validation: float
    augment: bool
    seed: int
    seeds: int
    device: str
    threads: int

    def experiment(self, data: ImageData) -> Experiment:
        """The trainings that this asks for.

        Raises:
            RecipeError: the network cannot be built or split.
        """
        keep = self.recipe == "prefix" and not self.augment
        set_up = partial(fine_tuning, optimizer=self.optimizer, cache=keep)
        num_layers = self._num_layers(data) if self.recipe == "gradual" else 0
        return Experiment(
            (Method(self.recipe, self.lr, partial(self._schedule, num_layers), set_up),),
            self.model,
            self.epochs,
            self.batch_size,
            range(self.seed, self.seed + self.seeds),
            self.device,
            weights=self.weights,
            validation=self.validation,
        )

    def _schedule(self, num_layers: int, total_steps: int) -> Schedule:
        """The recipe's schedule; gradual unfreezing ends at half of the run.

        Raises:
            ValueError: the configuration and the number of steps do not fit together.
        """
        warm = self.warmup_steps
        if self.recipe == "prefix":
            return Frozen(total_steps, until=self.until, warmup_steps=warm)
        if self.recipe == "gradual":
            if total_steps < num_layers:
                raise ValueError(
                    f"--recipe gradual starts a layer at a step, and needs {num_layers} steps for "
                    f"as many layers, got {total_steps}: take more --epochs or a smaller "
                    "--batch-size"
                )
            every = max(1, total_steps // (2 * num_layers))
            return GradualUnfreezing(total_steps, unfreeze_every=every, warmup_steps=warm)
        if self.recipe == "full":
            return Cosine(total_steps, warmup_steps=warm)
        return FreezeOut(total_steps, t_0=self.t_0, scale_lr=False, warmup_steps=warm)

    def _num_layers(self, data: ImageData) -> int:
        device = torch.device(self.device if is_own(self.model) else "meta")
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
        network = outline(self.model, **sizes).to(device)
        plan, _ = layers_of(self.model, network, data.example(device))
        return len(plan.layers)

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        """The images, from the files in ``data_dir``, read by so many processes."""
        data = load_data(self.data, data_dir, workers=workers, image_size=self.image_size)
        return data if self.augment else data.unvaried()

    def check(self, data: ImageData) -> None:
        """Raise ValueError where values that are fine alone do not fit together."""
        optional_package("matplotlib")  # before the training that its picture is of
        self.experiment(data).check(data)

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> Report:
        """Train, from where it stopped; write the table and the picture. See :func:`run_all`."""
        results = run_all(self.experiment(data), data, run_dir, say, quiet)
        report = Report(finetune_table(results), {"results": results})
        report.write(run_dir)
        plot_run(run_dir, run_dir.path / "plot.png")
        return report
