"""Ways to train one model on the same batches: torch's, FreezeOut by hand, and ours.

Rivals without freezing anneal by one cosine; the others follow the same :class:`FreezeOut`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from fastfreeze.schedule import Schedule

LR = 0.001  # rounding then stays rounding, which gates rely on; no time depends on it
HYPERS = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Task:
    """What all rivals train on.

    Attributes:
        model: as in :func:`fastfreeze.recipes.models.build_model`.
        images, labels: float32 ``[N, C, H, W]`` and int64 ``[N]``.
        order: sample ids int64 ``[steps, B]``, a row for each batch.
        seed: of the model's weights.
        lr: initial learning rate.
    """

    model: str
    images: Tensor
    labels: Tensor
    order: Tensor
    seed: int = 0
    lr: float = LR

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
    """A model in training: what differs between rivals.

    Attributes:
        model: holds the weights.
        network: gives the logits of images and their ids.
        optimizer: steps.
        after_step: sets learning rates and flags for the next step, given how many are taken.
        layout: memory format of the images.
        verify: raises where the network is not the model.
        notes: what there is to tell at the end.
        taken: steps.
    """

    model: nn.Module
    network: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    after_step: Callable[[int], object] = lambda taken: None
    layout: torch.memory_format = torch.contiguous_format
    verify: Callable[[Tensor], None] = lambda images: None
    notes: Callable[[], dict] = dict
    taken: int = 0

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


def layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def plain(task: Task, t_0: float, *, channels_last: bool = False, **options: bool) -> Training:
    """torch alone; nothing freezes."""
    layout = layout_of(channels_last)
    model = task.build().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), task.lr, **HYPERS, **options)
    anneal = stepping(CosineAnnealingLR(optimizer, task.total_steps))
    return Training(model, lambda images, ids: model(images), optimizer, anneal, layout)


def stepping(scheduler: LRScheduler) -> Callable[[int], object]:
    """A scheduler of torch after each step."""
    return lambda taken: scheduler.step()


def frozen_layers(schedule: Schedule, num_layers: int) -> list[int]:
    """How many layers are frozen at each step."""
    events = schedule.frozen_layers(num_layers)
    ends = [*(step for step, _ in events[1:]), schedule.total_steps]
    pairs = zip(events, ends, strict=True)
    return [len(frozen) for (start, frozen), end in pairs for _ in range(start, end)]


def flags(task: Task, t_0: float, *, channels_last: bool = False, **options: bool) -> Training:
    """FreezeOut as its authors wrote it: requires_grad off, norms in eval mode, torch's SGD.

    Its notes tell the seconds that the forward of what is frozen takes: without them, the run is
    the least that torch's kernels take for the layers that train.
    """
    layout = layout_of(channels_last)
    model = task.build().to(memory_format=layout)
    schedule = fastfreeze.FreezeOut(task.total_steps, t_0=t_0)
    layers = fastfreeze.split(model, task.images[:2]).layers
    links = [model.stem, *model.blocks, model.head]
    num_frozen = frozen_layers(schedule, len(links))
    groups = [{"params": list(layer.trainable)} for layer in layers]
    optimizer = torch.optim.SGD(groups, task.lr, **HYPERS, **options)
    steps = np.arange(task.total_steps + 1)
    lrs = [schedule.lr(steps, task.lr, layer.index, len(layers)) for layer in layers]
    freezing = [schedule.freeze_steps(layer.index, len(layers)) for layer in layers]
    prefix_seconds = 0.0

    def follow(taken: int) -> None:
        for group, layer, lr, frozen in zip(
            optimizer.param_groups, layers, lrs, freezing, strict=True
        ):
            group["lr"] = lr[taken]
            if taken in frozen:
                for parameter in layer.trainable:
                    parameter.requires_grad_(False).grad = None
                for name in layer.modules:
                    model.get_submodule(name).eval()

    def network(images: Tensor, ids: Tensor) -> Tensor:
        nonlocal prefix_seconds
        k = num_frozen[training.taken]
        start = time.perf_counter()
        x = run_chain(links[:k], images)
        prefix_seconds += time.perf_counter() - start
        return run_chain(links[k:], x)

    follow(0)
    training = Training(model, network, optimizer, follow, layout)
    training.notes = lambda: {"prefix_seconds": prefix_seconds}
    return training


def run_chain(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The links one after the other: what :class:`fastfreeze.recipes.models.Network` does."""
    for link in links:
        x = link(x)
    return x


def ours(task: Task, t_0: float, *, cache: bool = False, channels_last: bool = False) -> Training:
    """fastfreeze's SGD and trimmed network; with ``cache`` features are kept."""
    layout = layout_of(channels_last)
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


Make = Callable[[Task, float], Training]
BASELINE, BEST_TORCH = "torch", "torch channels_last fused"
FLAGS, BEST_FLAGS, CACHE = "flags", "flags channels_last fused", f"{OURS} cache"
NOT_FREEZING: dict[str, Make] = {
    BASELINE: plain,
    BEST_TORCH: partial(plain, channels_last=True, fused=True),
}
FREEZING: dict[str, Make] = {
    FLAGS: flags,
    BEST_FLAGS: partial(flags, channels_last=True, fused=True),
    OURS: ours,
    CACHE: partial(ours, cache=True),
    f"{OURS} channels_last": partial(ours, channels_last=True),
    f"{OURS} channels_last cache": partial(ours, channels_last=True, cache=True),
}
