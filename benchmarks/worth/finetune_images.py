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


def learn(run: Run, folder: Path, counted: bool) -> dict:
    count = int(run.task.partition(" ")[0].replace(",", ""))
    x, labels = images(folder, "train", VALIDATION + count)
    orders = [
        torch.randperm(count, generator=epoch_generator(run.seed, epoch))
        for epoch in range(run.epochs)
    ]
    task = MobileNet(
        run.task,
        x[VALIDATION:],
        labels[VALIDATION:],
        torch.cat(orders).view(-1, BATCH_SIZE),
        run.seed,
        run.lr,
        weights=found_in(folder)[WEIGHTS],
        epochs=run.epochs,
    )
    sets = {
        "validation_": (x[:VALIDATION], labels[:VALIDATION]),
        "": images(folder, "t10k", TEST),
    }
    return record(QUESTION.methods[run.method], task, counted, sets)


QUESTION = Question(
    "Fine-tuning MobileNetV2 on images",
    BUDGETS,
    methods(lrs=(0.0025, 0.01, 0.04)),
    learn,
    partial(fetch, names=(WEIGHTS, *FILES), how=HOW),
)
