"""One step of training with the first half of the layers frozen, on few images.

Forward, loss, backward and update; frozen layers have ``requires_grad`` off and norms in eval mode.
The floor is torch's step of the other half alone, fed with what the frozen half gives; only
:mod:`fastfreeze.recipes.models` are chains that can be cut so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastfreeze
from benchmarks.case import OURS, Case, Run
from benchmarks.optimizer_cases import GATE_STEPS, TOTAL_STEPS
from benchmarks.shapes import TORCHVISION, network
from benchmarks.training_rivals import HYPERS, LR, Training, largest_deviation, run_chain
from fastfreeze.recipes.models import Network

BATCH_SIZE = 4
IMAGE_SIZES = {
    "resnet110": 32,
    "wrn40-4": 32,
    "densenet40": 32,
    "densenet-bc-100": 32,
    "vgg16": 32,
    "resnet50": 64,
    "vit_b_16": 64,
}
# Of what the gate's steps change in a tensor. Folding makes 0.07, in a norm whose gradient is a sum
# that cancels; momentum that is forgotten makes 0.5, a missing update 1.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Batch:
    """What all rivals train on: the same batch again and again.

    Attributes:
        model: as in :func:`benchmarks.shapes.network`.
        images, labels: float32 ``[B, 3, H, W]`` and int64 ``[B]``.
    """

    model: str
    images: Tensor
    labels: Tensor

    def build(self) -> tuple[nn.Module, list[str], int]:
        """The network with half of its layers frozen, their modules, and the number of layers."""
        torch.manual_seed(0)
        options = {"num_classes": 10} if self.model in TORCHVISION else {}
        if self.model.startswith("vit"):
            options["image_size"] = self.images.shape[-1]
        model = network(self.model, **options)
        layers = fastfreeze.split(model, self.images[:2]).layers
        frozen = layers[: len(layers) // 2]
        for layer in frozen:
            for parameter in layer.trainable:
                parameter.requires_grad_(False)
        return model, [name for layer in frozen for name in layer.modules], len(layers)


@dataclass(frozen=True)
class Step:
    """A run: one more step of that training."""

    training: Training
    images: Tensor
    labels: Tensor

    def __call__(self) -> float:
        return self.training.step(self.images, self.labels, self.labels)  # ids are not asked for


def step_case(model_name: str, image_size: int) -> Case:
    """A training step of ``BATCH_SIZE`` images of that size."""
    torch.manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, image_size, image_size)
    batch = Batch(model_name, images, torch.randint(10, (BATCH_SIZE,)))
    start, _, num_layers = batch.build()
    truth = by_flags(batch)
    for _ in range(GATE_STEPS):
        truth()
    case = Case(
        name=f"training step, {model_name}, {BATCH_SIZE} images of {image_size}x{image_size}, "
        f"{num_layers // 2} of {num_layers} layers frozen",
        floor=_unfrozen_alone(batch) if isinstance(start, Network) else None,
    )
    makes: dict[str, Callable[[Batch], Step]] = {
        OURS: by_fastfreeze,
        f"{OURS} channels_last": partial(by_fastfreeze, channels_last=True),
        "torch": by_flags,
        "torch fused": partial(by_flags, fused=True),
        "torch channels_last fused": partial(by_flags, channels_last=True, fused=True),
    }
    for name, make in makes.items():
        case.add(name, partial(make, batch), lambda step: _wrong(step, truth.training, start))
    return case


def by_flags(batch: Batch, *, channels_last: bool = False, **options: bool) -> Step:
    """torch alone, the frozen layers in eval mode."""
    model, frozen_modules, _ = batch.build()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    for name in frozen_modules:
        model.get_submodule(name).eval()
    return Step(_torch_training(model, layout, **options), batch.images, batch.labels)


def by_fastfreeze(batch: Batch, *, channels_last: bool = False) -> Step:
    """The trimmed network and our SGD."""
    model, _, _ = batch.build()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    schedule = fastfreeze.Cosine(TOTAL_STEPS)
    optimizer = fastfreeze.SGD(model.parameters(), LR, **HYPERS, schedule=schedule)
    trimmed = fastfreeze.trim(model)
    training = Training(
        model,
        lambda images, ids: trimmed(images),
        optimizer,
        layout=layout,
        verify=trimmed.verify,
    )
    return Step(training, batch.images, batch.labels)


def _torch_training(model: nn.Module, layout: torch.memory_format, **options: bool) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), LR, **HYPERS, **options)
    scheduler = CosineAnnealingLR(optimizer, TOTAL_STEPS)
    return Training(model, lambda images, ids: model(images), optimizer, scheduler.step, layout)


def _unfrozen_alone(batch: Batch) -> Run:
    model, _, num_layers = batch.build()
    links = [model.stem, *model.blocks, model.head]
    half = num_layers // 2
    with torch.no_grad():
        features = run_chain([link.eval() for link in links[:half]], batch.images)
    rest = nn.Sequential(*links[half:]).to(memory_format=torch.channels_last)
    return Step(_torch_training(rest, torch.channels_last, fused=True), features, batch.labels)


def _wrong(step: Step, truth: Training, start: nn.Module) -> str | None:
    """What keeps a rival's training from being torch's; None if nothing does."""
    for _ in range(GATE_STEPS):
        step()
    step.training.verify(step.images)
    error, tensor = largest_deviation(step.training, truth, start)
    if error <= TOLERANCE:
        return None
    return f"another result: {tensor} is {error:.1e} of its change from torch's"


STEP_CASES: dict[str, Callable[[], Case]] = {
    f"step-{model}-frozen-50": partial(step_case, model, size)
    for model, size in IMAGE_SIZES.items()
}
