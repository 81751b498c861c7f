"""MobileNetV2 with ImageNet's weights learns Fashion-MNIST from few images, 64 x 64 pixels each.

They are not augmented, for all methods alike. LoRA needs the package ``peft``, and one rival
``lightning``; a method whose package is missing fails, and the others run.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastfreeze
from benchmarks.training_rivals import HYPERS
from benchmarks.worth.finetuning import FineTask, methods
from benchmarks.worth.question import Question, Run, fetch
from benchmarks.worth.training import record
from examples.finetune_image import FILES, HOW, WEIGHTS, found_in, mobilenet, read
from fastfreeze.recipes.data import epoch_generator

SIZE, BATCH_SIZE = 64, 32
VALIDATION, TEST = 2000, 5000  # images
RATES = (0.0025, 0.01, 0.04)
# Whole batches, so that an epoch has each image.
BUDGETS = {"2,048 images": (1, 2, 4, 8), "512 images": (2, 4, 8, 16), "10,240 images": (1, 2, 4)}


class MobileNet(FineTask):
    """Its blocks are stages; images float32 ``[N, 3, 64, 64]``."""

    layout = torch.channels_last
    half, last_block = 10, 3
    optimizer = staticmethod(partial(torch.optim.SGD, fused=True, **HYPERS))
    ours = staticmethod(partial(fastfreeze.SGD, **HYPERS))

    def pretrained(self) -> nn.Module:
        return mobilenet(self.weights).train()

    def stages(self, model: nn.Module) -> list[nn.Module]:
        return [*model.features, model.classifier]

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.features(x).mean((2, 3))

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        return model.classifier(features)

    def lora_names(self, model: nn.Module, first: int) -> list[str]:
        """The convolutions of 1 x 1, which hold most of the weights."""
        return [
            f"features.{name}"
            for name, module in model.features.named_modules()
            if isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and int(name.partition(".")[0]) >= first
        ]


@cache
def images(folder: Path, part: str, count: int) -> tuple[Tensor, ...]:
    """With their labels; kept for the next run of a process."""
    return read(found_in(folder), part, count, SIZE).tensors


def _train_images(folder: Path, name: str) -> tuple[Tensor, ...]:
    """Those for validation, and then as many as the name says."""
    return images(folder, "train", VALIDATION + int(name.partition(" ")[0].replace(",", "")))


def task_of(folder: Path, name: str, epochs: int, seed: int, lr: float) -> MobileNet:
    """So many epochs of as many images as the name says."""
    x, labels = (found[VALIDATION:] for found in _train_images(folder, name))
    orders = [
        torch.randperm(len(x), generator=epoch_generator(seed, epoch)) for epoch in range(epochs)
    ]
    return MobileNet(
        name,
        x,
        labels,
        torch.cat(orders).view(-1, BATCH_SIZE),
        seed,
        lr,
        weights=found_in(folder)[WEIGHTS],
        epochs=epochs,
    )


def sets(folder: Path, name: str) -> dict[str, tuple[Tensor, ...]]:
    """What a run is judged by, by what the names in its record begin with."""
    x, labels = _train_images(folder, name)
    return {
        "validation_": (x[:VALIDATION], labels[:VALIDATION]),
        "": images(folder, "t10k", TEST),
    }


def learn(run: Run, folder: Path, counted: bool) -> dict:
    task = task_of(folder, run.task, run.epochs, run.seed, run.lr)
    return record(QUESTION.methods[run.method], task, counted, sets(folder, run.task))


QUESTION = Question(
    "Fine-tuning MobileNetV2 on images",
    BUDGETS,
    methods(RATES),
    learn,
    partial(fetch, names=(WEIGHTS, *FILES), how=HOW),
)
