"""Fashion-MNIST for trainings from scratch: shifted and mirrored, some of it held out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training_rivals import Task
from benchmarks.worth import question
from examples.finetune_image import FILES
from fastfreeze.recipes.data import ImageData, epoch_generator, load_data

HOW = """{folder} lacks {missing}. To get it:
  apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb {folder}"""
BATCH_SIZE, VALIDATION = 64, 2000
CPU = torch.device("cpu")
fetch = partial(question.fetch, names=FILES, how=HOW)
Labelled = tuple[Tensor, Tensor]  # float32 [N, 1, 28, 28] and int64 [N]


@dataclass(frozen=True)
class Varied(Task):
    """A task whose images are shifted and mirrored anew in each batch.

    Attributes:
        black: the value of a black pixel, which moves in.
        pad: the largest shift.
    """

    black: Tensor = field(kw_only=True)
    pad: int = field(kw_only=True)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, ids = super().batch(step)
        generator = epoch_generator(self.seed, step)
        return shifted(images - self.black, self.pad, generator) + self.black, labels, ids


@dataclass(frozen=True)
class Fashion:
    """Normalised images: those to train on, those to choose by, and all of the test set."""

    train: Labelled
    validation: Labelled
    test: Labelled
    black: Tensor
    pad: int

    @property
    def sets(self) -> dict[str, Labelled]:
        """What a run is judged by, by what the names in its record begin with."""
        return {"": self.test, "validation_": self.validation}

    def task(self, model: str, epochs: int, seed: int, lr: float) -> Varied:
        """So many epochs, each in an order of its own; what fills no batch is left out."""
        images, labels = self.train
        used = len(labels) // BATCH_SIZE * BATCH_SIZE
        orders = [
            torch.randperm(len(labels), generator=epoch_generator(seed, epoch))[:used]
            for epoch in range(epochs)
        ]
        order = torch.cat(orders).view(-1, BATCH_SIZE)
        return Varied(model, images, labels, order, seed, lr, black=self.black, pad=self.pad)


@cache
def read(folder: Path, count: int) -> Fashion:
    """``count`` training images, 2,000 others for validation, and the test images.

    They are kept for the next run of a process.
    """
    data = load_data("fashion-mnist", folder)
    split = data.part(count + VALIDATION).held_out(VALIDATION / (count + VALIDATION))
    return Fashion(
        _normalised(replace(split, test=split.train)),
        _normalised(split),
        _normalised(data),
        (-data.mean / data.std).view(-1, 1, 1),
        data.pad,
    )


def _normalised(data: ImageData) -> Labelled:
    return next(data.test_batches(len(data.test.labels), CPU))


def shifted(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each of ``images`` by up to ``pad`` pixels, zeros moving in, and half of them mirrored."""
    B, _, H, W = images.shape
    mirrored = torch.rand(B, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, torch.arange(W).flip(0), torch.arange(W))
    shifts = torch.randint(2 * pad + 1, (2, B, 1), generator=generator)
    rows, columns = torch.arange(H) + shifts[0], columns + shifts[1]
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
