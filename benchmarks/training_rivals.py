"""Ways to train one model on the same batches: torch's, FreezeOut by hand, and ours.

Rivals without freezing anneal by one cosine; the others follow the same :class:`FreezeOut`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import fastfreeze
from benchmarks.case import OURS
from fastfreeze.recipes.models import build_model

LR = 0.001  # rounding then stays rounding, which gates rely on; no time depends on it
HYPERS = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
AS_IT_IS, LAST = torch.contiguous_format, torch.channels_last
# Of what a gate's steps change in all weights, and in all statistics, together. Between torch's
# own memory layouts 0.03 is seen in MobileNetV2, and 0.35 under autocast to bf16; momentum that is
# forgotten makes 0.5, a missing update 1.
TOLERANCE, BF16_TOLERANCE = 0.1, 0.4


@dataclass(frozen=True)
class Task:
    """What all rivals train on."""

    model: str  # as in fastfreeze.recipes.models.build_model
    images: Tensor  # float32 [N, C, H, W]
    labels: Tensor  # int64 [N]
    order: Tensor  # sample ids int64 [steps, B], a row for each batch
    seed: int = 0  # of the model's weights
    lr: float = LR  # at the start

    @classmethod
    def random(
        cls, model: str, samples: int, batch_size: int, epochs: int, image_size: int = 32
    ) -> Task:
        """Noise, in another order each epoch; samples that fill no batch are left out."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(samples, 3, image_size, image_size, generator=generator)
        labels = torch.randint(10, (samples,), generator=generator)
        used = samples // batch_size * batch_size
        orders = [torch.randperm(samples, generator=generator)[:used] for _ in range(epochs)]
        return cls(model, images, labels, torch.cat(orders).view(-1, batch_size))

    @property
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.labels) // self.order.shape[1]

    def build(self) -> nn.Module:
        """The model, with the same weights each time."""
        torch.manual_seed(self.seed)
        return build_model(self.model, in_channels=self.images.shape[1])

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the model is called with."""
        return (x,)

    def logits(self, output: Any) -> Tensor:
        """Of what the model gives."""
        return output

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and ids."""
        ids = self.order[step]
        return self.images[ids], self.labels[ids], ids


@dataclass
class Training:
    """A model in training: what differs between rivals."""

    model: nn.Module  # holds the weights
    network: Callable[[Tensor, Tensor], Tensor]  # logits of images and their ids
    optimizer: torch.optim.Optimizer
    after_step: Callable[[int], object] = lambda taken: None  # rates and flags for the next step
    layout: torch.memory_format = AS_IT_IS  # of the images
    verify: Callable[[Tensor], None] = lambda images: None  # raises where network is not model
    notes: Callable[[], dict] = dict  # what there is to tell at the end
    taken: int = 0  # steps

    def step(self, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Train on a batch; its loss."""
        images = images.contiguous(memory_format=self.layout)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(images, ids), labels)
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        self.after_step(self.taken)
        return loss.detach()


def plain(
    task: Task, t_0: float, *, layout: torch.memory_format = AS_IT_IS, **options: bool
) -> Training:
    """torch alone; nothing freezes."""
    model = task.build().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), task.lr, **HYPERS, **options)
    anneal = stepping(CosineAnnealingLR(optimizer, task.total_steps))
    return Training(model, lambda images, ids: model(images), optimizer, anneal, layout)


def stepping(scheduler: LRScheduler) -> Callable[[int], object]:
    """A scheduler of torch after each step."""
    return lambda taken: scheduler.step()


def flags(
    task: Task, t_0: float, *, layout: torch.memory_format = AS_IT_IS, **options: bool
) -> Training:
    """FreezeOut as its authors wrote it: requires_grad off, norms in eval mode, torch's SGD.

    Its notes tell the seconds that the forward of what is frozen takes: without them, the run is
    the least that torch's kernels take for the layers that train.
    """
    model = task.build().to(memory_format=layout)
    schedule = fastfreeze.FreezeOut(task.total_steps, t_0=t_0)
    layers = fastfreeze.split(model, task.images[:2]).layers
    links = [model.stem, *model.blocks, model.head]  # what the model does, one after the other
    groups = [{"params": list(layer.trainable)} for layer in layers]
    optimizer = torch.optim.SGD(groups, task.lr, **HYPERS, **options)
    steps = np.arange(task.total_steps + 1)
    lrs = [schedule.lr(steps, task.lr, layer.index, len(layers)) for layer in layers]
    freezing = [schedule.freeze_steps(layer.index, len(layers)) for layer in layers]
    num_frozen, prefix_seconds = 0, 0.0

    def follow(taken: int) -> None:
        nonlocal num_frozen
        for group, layer, lr, steps in zip(
            optimizer.param_groups, layers, lrs, freezing, strict=True
        ):
            group["lr"] = lr[taken]
            if taken in steps:
                num_frozen = layer.index + 1
                for parameter in layer.trainable:
                    parameter.requires_grad_(False).grad = None
                for name in layer.modules:
                    model.get_submodule(name).eval()

    def network(x: Tensor, ids: Tensor) -> Tensor:
        nonlocal prefix_seconds
        start = time.perf_counter()
        for link in links[:num_frozen]:
            x = link(x)
        prefix_seconds += time.perf_counter() - start
        for link in links[num_frozen:]:
            x = link(x)
        return x

    follow(0)
    training = Training(model, network, optimizer, follow, layout)
    training.notes = lambda: {"prefix_seconds": prefix_seconds}
    return training


def ours(
    task: Task, t_0: float, *, cache: bool = False, layout: torch.memory_format = AS_IT_IS
) -> Training:
    """fastfreeze's SGD and trimmed network; with ``cache`` features are kept."""
    model = task.build().to(memory_format=layout)
    schedule = fastfreeze.FreezeOut(task.total_steps, t_0=t_0)
    plan = fastfreeze.split(model, task.images[:2], schedule=schedule, lr=task.lr)
    optimizer = fastfreeze.SGD(plan.param_groups(), task.lr, **HYPERS, schedule=schedule)
    trimmed = fastfreeze.trim(model)
    training = Training(
        model, lambda images, ids: trimmed(images), optimizer, layout=layout, verify=trimmed.verify
    )
    if cache:
        features = fastfreeze.FeatureCache(trimmed)
        training.network = lambda images, ids: features(images, samples=ids)
        training.notes = lambda: {**asdict(features.stats()), "reason": features.reason}
    return training


State = Mapping[str, Tensor]


def deviation(
    training: Training, truth: State, start: State, tolerance: float = TOLERANCE
) -> str | None:
    """What tells a training from the true one, which ends so; None if nothing but rounding does.

    Both must have changed the same tensors, and count the same. Weights, and then statistics, may
    be apart by a share of what has changed in all of them.
    """
    found, floats = training.model.state_dict(), set()
    for name, value in truth.items():
        changed = not value.equal(start[name])
        if found[name].equal(start[name]) == changed:
            return f"another result: {name} has {'not ' * changed}changed"
        if value.is_floating_point():
            floats.add(name)
        elif not found[name].equal(value):
            return f"another result: {name} is {found[name]}, not {value}"
    weights = {name for name, _ in training.model.named_parameters()}
    for what, names in {"weights": floats & weights, "statistics": floats - weights}.items():
        error, change = (
            math.hypot(*((a[n].double() - truth[n].double()).norm().item() for n in names))
            for a in (found, start)
        )
        if not error <= tolerance * change:
            return f"another result: {what} are {error / change:.1e} of their change from torch's"
    return None


Make = Callable[[Task, float], Training]
BASELINE, BEST_TORCH = "torch", "torch channels_last fused"
FLAGS, BEST_FLAGS, CACHE = "flags", "flags channels_last fused", f"{OURS} cache"
NOT_FREEZING: dict[str, Make] = {
    BASELINE: plain,
    BEST_TORCH: partial(plain, layout=LAST, fused=True),
}
FREEZING: dict[str, Make] = {
    FLAGS: flags,
    BEST_FLAGS: partial(flags, layout=LAST, fused=True),
    OURS: ours,
    CACHE: partial(ours, cache=True),
    f"{OURS} channels_last": partial(ours, layout=LAST),
    f"{OURS} channels_last cache": partial(ours, layout=LAST, cache=True),
}
