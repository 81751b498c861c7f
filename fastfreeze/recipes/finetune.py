"""``fastfreeze finetune``: a pretrained network for images of one's own, most of it frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.networks import is_own, layers_of
from fastfreeze.recipes.rundir import Line
from fastfreeze.recipes.runs import Experiment, RunConfig
from fastfreeze.recipes.tables import Table, finetune_table
from fastfreeze.recipes.training import Method, fine_tuning
from fastfreeze.schedule import Cosine, FreezeOut, Frozen, GradualUnfreezing, Schedule


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """What a fine-tuning is asked to do: the options of ``fastfreeze finetune``."""

    recipe: str
    optimizer: str
    image_size: int
    weights: str | None
    epochs: int
    batch_size: int
    lr: float
    until: int | str | float
    t_0: float
    warmup_steps: int
    validation: float
    augment: bool

    def experiment(self, data: ImageData) -> Experiment:
        if self.weights is None and not is_own(self.model):
            raise ValueError(
                f"--weights is missing, the file of {self.model}'s pretrained weights "
                "(a network of your own, MODULE:FUNCTION, may bring its own)"
            )
        fixed = (self.model, data, self.epochs, self.batch_size, self.device)
        asked = Experiment((), *fixed, weights=self.weights, validation=self.validation)
        num_layers = 0
        if self.recipe == "gradual":
            num_layers = len(layers_of(self.model, *asked.outlined())[0].layers)
        keep = self.recipe == "prefix" and not self.augment
        set_up = partial(fine_tuning, optimizer=self.optimizer, cache=keep)
        method = Method(self.recipe, self.lr, partial(self._schedule, num_layers), set_up)
        return replace(asked, methods=(method,))

    def _schedule(self, num_layers: int, total_steps: int) -> Schedule:
        """The recipe's; gradual unfreezing of so many layers ends at half of the run."""
        warm = self.warmup_steps
        if self.recipe == "prefix":
            return Frozen(total_steps, until=self.until, warmup_steps=warm)
        if self.recipe == "full":
            return Cosine(total_steps, warmup_steps=warm)
        if self.recipe == "freezeout":
            return FreezeOut(total_steps, t_0=self.t_0, scale_lr=False, warmup_steps=warm)
        if total_steps < num_layers:
            raise ValueError(
                f"--recipe gradual starts a layer at a step, and needs {num_layers} steps for "
                f"as many layers, got {total_steps}: take more --epochs or a smaller --batch-size"
            )
        every = max(1, total_steps // (2 * num_layers))
        return GradualUnfreezing(total_steps, unfreeze_every=every, warmup_steps=warm)

    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        data = load_data(self.data, data_dir, workers=workers, image_size=self.image_size)
        return data if self.augment else data.unvaried()

    def outcome(self, results: Sequence[Line], data: ImageData) -> tuple[Table, Line]:
        return finetune_table(results), {}
