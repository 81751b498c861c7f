"""The rivals of ``python -m benchmarks.training``: ways to train one model on the same batches.

Rivals without freezing anneal by one cosine; the others follow the same :class:`FreezeOut`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastfreeze
from fastfreeze.recipes.models import build_model
from fastfreeze.schedule import Schedule

LR = 0.001  # rounding then stays rounding, which the gate relies on; no time depends on it
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
        after_step: sets learning rates and flags for the next step.
        layout: memory format of the images.
        verify: raises where the network is not the model.
        notes: what there is to tell at the end.
    """

    model: nn.Module
    network: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None] = lambda: None
    layout: torch.memory_format = torch.contiguous_format
    verify: Callable[[Tensor], None] = lambda images: None
    notes: Callable[[], dict] = dict

    def step(self, images: Tensor, labels: Tensor, ids: Tensor) -> float:
        """Train on a batch; its loss."""
        images = images.contiguous(memory_format=self.layout)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(images, ids), labels)
        loss.backward()
        self.optimizer.step()
        self.after_step()
        return loss.item()


def plain(task: Task, t_0: float, *, channels_last: bool = False, **options: bool) -> Training:
    """torch alone; nothing freezes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = task.build().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), task.lr, **HYPERS, **options)
    scheduler = CosineAnnealingLR(optimizer, task.total_steps)
    return Training(model, lambda images, ids: model(images), optimizer, scheduler.step, layout)


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
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = task.build().to(memory_format=layout)
    schedule = fastfreeze.FreezeOut(task.total_steps, t_0=t_0)
    layers = fastfreeze.split(model, task.images[:2]).layers
    links = [model.stem, *model.blocks, model.head]
    num_frozen = frozen_layers(schedule, len(links))
    prefix_seconds = 0.0
    groups = [{"params": list(layer.trainable)} for layer in layers]
    optimizer = torch.optim.SGD(groups, task.lr, **HYPERS, **options)
    steps = np.arange(task.total_steps + 1)
    lrs = [schedule.lr(steps, task.lr, layer.index, len(layers)) for layer in layers]
    freezing = [schedule.freeze_steps(layer.index, len(layers)) for layer in layers]
    taken = -1

    def follow() -> None:
        nonlocal taken
        taken += 1
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
        k = num_frozen[taken]
        start = time.perf_counter()
        x = run_chain(links[:k], images)
        prefix_seconds += time.perf_counter() - start
        return run_chain(links[k:], x)

    def notes() -> dict:
        return {"prefix_seconds": prefix_seconds}

    follow()
    return Training(model, network, optimizer, follow, layout, notes=notes)


def run_chain(links: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The links one after the other: what :class:`fastfreeze.recipes.models.Network` does."""
    for link in links:
        x = link(x)
    return x


def ours(
    task: Task,
    t_0: float,
    *,
    cache: bool = False,
    enabled: bool | None = None,
    channels_last: bool = False,
) -> Training:
    """fastfreeze's SGD and trimmed network; with ``cache`` features are kept, where ``enabled``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = task.build().to(memory_format=layout)
    schedule = fastfreeze.FreezeOut(task.total_steps, t_0=t_0)
    plan = fastfreeze.split(model, task.images[:2], schedule=schedule, lr=task.lr)
    optimizer = fastfreeze.SGD(plan.param_groups(), task.lr, **HYPERS, schedule=schedule)
    trimmed = fastfreeze.trim(model)
    training = Training(
        model, lambda images, ids: trimmed(images), optimizer, layout=layout, verify=trimmed.verify
    )
    if cache:
        features = fastfreeze.FeatureCache(trimmed, enabled=enabled)
        training.network = lambda images, ids: features(images, samples=ids)
        training.notes = lambda: {**asdict(features.stats()), "reason": features.reason}
    return training


Make = Callable[[Task, float], Training]
BASELINE, BEST_TORCH, FLAGS = "torch", "torch channels_last fused", "flags"
NOT_FREEZING: dict[str, Make] = {
    BASELINE: plain,
    BEST_TORCH: partial(plain, channels_last=True, fused=True),
}
FREEZING: dict[str, Make] = {
    FLAGS: flags,
    f"{FLAGS} channels_last fused": partial(flags, channels_last=True, fused=True),
    "fastfreeze": ours,
    "fastfreeze cache": partial(ours, cache=True),
    "fastfreeze cache on": partial(ours, cache=True, enabled=True),
    "fastfreeze channels_last": partial(ours, channels_last=True),
    "fastfreeze channels_last cache": partial(ours, channels_last=True, cache=True),
}


@dataclass
class RunTimes:
    """A rival's whole run: all the time that passed, from the start, but for others' turns.

    Attributes:
        setup: seconds of making the model, optimizer and network.
        steps: seconds of each step.
        losses: of each step.
        notes: what the rival tells at the end.
    """

    setup: float = 0.0
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    notes: dict = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.setup + sum(self.steps)


def train(
    make: Callable[[], Training], task: Task, times: RunTimes, slice_steps: int
) -> Iterator[None]:
    """Train from start to end and note the times; pause after each slice of steps."""
    start = time.perf_counter()
    training = make()
    times.setup = time.perf_counter() - start
    for step in range(task.total_steps):
        start = time.perf_counter()
        times.losses.append(training.step(*task.batch(step)))
        times.steps.append(time.perf_counter() - start)
        if (step + 1) % slice_steps == 0:
            yield
    times.notes = training.notes()


def take_turns(
    makes: Mapping[str, Callable[[], Training]], task: Task, first: int, slice_steps: int = 10
) -> dict[str, RunTimes]:
    """Whole runs of all rivals side by side, a slice at a time, in an order that rotates.

    Args:
        makes: the rivals by name.
        task: what they train on.
        first: which of them begins.
        slice_steps: steps in a slice.
    """
    names = list(makes)
    times = {name: RunTimes() for name in names}
    runs = {name: train(makes[name], task, times[name], slice_steps) for name in names}
    for turn in range(first, first + task.total_steps // slice_steps + 1):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            next(runs[name], None)
    return times


def largest_deviation(found: Training, truth: Training, start: nn.Module) -> tuple[float, str]:
    """How far two trainings that should agree are apart, and in which tensor.

    Of each parameter and buffer: the difference's norm, relative to that of what ``truth`` has
    changed since ``start``; infinite where it changed nothing and the other did. A change that is a
    hundredth of the network's, an element, counts as that: a bias before a norm, whose gradient is
    zero, changes by rounding alone.
    """
    a, b, before = (m.state_dict() for m in (found.model, truth.model, start))
    changes = {name: (b[name].double() - before[name].double()).norm().item() for name in b}
    trained = [(name, p.numel()) for name, p in truth.model.named_parameters()]
    squares = sum(changes[name] ** 2 for name, _ in trained)
    usual = math.sqrt(squares / sum(numel for _, numel in trained))  # of an element
    worst = (0.0, "nothing")
    for name, change in changes.items():
        difference = (a[name].double() - b[name].double()).norm().item()
        if difference:
            least = 0.01 * usual * math.sqrt(b[name].numel())
            error = difference / max(change, least) if change else math.inf
            worst = max(worst, (math.inf if math.isnan(error) else error, name))
    return worst
