"""Ways to train, and the loop that they share: what a user would copy.

Each way is a function that sets up an optimizer; :func:`train_epoch` then runs any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from fastfreeze.clock import Clock
from fastfreeze.freezing import LayerPlan, split
from fastfreeze.optim import SGD
from fastfreeze.recipes.data import ImageData
from fastfreeze.report import FreezeReport
from fastfreeze.schedule import Cosine, Schedule, StepDecay
from fastfreeze.trimming import trim

EVALUATION_BATCH = 250
# Both papers: Nesterov momentum, and weight decay on every parameter.
_HYPERS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


@dataclass
class Setup:
    """What a method trains with.

    Attributes:
        model: the network that is evaluated and saved.
        network: what a training step calls: the model, or its trimmed form.
        optimizer: steps and, with a schedule of its own, freezes.
        schedule: the learning rates as a function of the step.
        scheduler: torch's, where the optimizer does not know the schedule.
        plan: the layers, where some freeze.
        report: what freezing saves, once :meth:`measure` was called and some freeze.
    """

    model: nn.Module
    network: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scheduler: CosineAnnealingLR | MultiStepLR | None = None
    plan: LayerPlan | None = None
    report: FreezeReport | None = None

    def measure(self, example: Tensor) -> None:
        """Measure from here on what freezing saves."""
        if self.plan is not None:
            self.report = FreezeReport(self.model, self.optimizer, self.plan, example)

    def step(self) -> AbstractContextManager[None]:
        """Around each training step."""
        return nullcontext() if self.report is None else self.report.step()

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are frozen now."""
        return self.optimizer.frozen_layers if isinstance(self.optimizer, SGD) else ()

    def backward_removed(self) -> float:
        """Share of the backward FLOPs, in 0..1, that is gone now: schedules freeze a prefix."""
        if self.plan is None:
            return 0.0
        return sum(self.plan.backward_share(layer) or 0.0 for layer in self.frozen_layers)


@dataclass(frozen=True)
class Method:
    """One way to train, as results and files call it.

    Attributes:
        name: a word without spaces.
        lr: learning rate at the start, > 0.
        schedule: of the number of steps in a run; it decides how to train, see :func:`set_up`.
    """

    name: str
    lr: float
    schedule: Callable[[int], Schedule]


def set_up(model: nn.Module, schedule: Schedule, lr: float, example: Tensor) -> Setup:
    """The optimizer, and where layers freeze the trimmed network, that a schedule asks for."""
    if schedule.freezes:
        return freezing(model, schedule, lr, example)
    if isinstance(schedule, (Cosine, StepDecay)):
        return plain_sgd(model, schedule, lr)
    return snapshots(model, schedule, lr)


def plain_sgd(model: nn.Module, schedule: Cosine | StepDecay, lr: float) -> Setup:
    """What the others are measured against: all that torch has, in its fastest form."""
    optimizer = torch.optim.SGD(model.parameters(), lr, fused=True, **_HYPERS)
    scheduler: CosineAnnealingLR | MultiStepLR
    if isinstance(schedule, StepDecay):
        scheduler = MultiStepLR(optimizer, schedule.milestones)
    else:
        scheduler = CosineAnnealingLR(optimizer, schedule.total_steps)
    return Setup(model, model, optimizer, schedule, scheduler)


def snapshots(model: nn.Module, schedule: Schedule, lr: float) -> Setup:
    """Cyclic learning rates; nothing freezes."""
    optimizer = SGD(model.parameters(), lr, **_HYPERS, schedule=schedule)
    return Setup(model, model, optimizer, schedule)


def freezing(model: nn.Module, schedule: Schedule, lr: float, example: Tensor) -> Setup:
    """Layers freeze as the schedule says; the backward of the frozen ones is cut off."""
    plan = split(model, example, schedule=schedule, lr=lr)
    optimizer = SGD(plan.param_groups(), lr, **_HYPERS, schedule=schedule)
    return Setup(model, trim(model, example), optimizer, schedule, plan=plan)


def train_epoch(
    setup: Setup,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    after_step: Callable[[], None],
) -> tuple[list[float], list[float]]:
    """One pass over the training images.

    Args:
        setup: a method's model and optimizer.
        batches: images and labels, on the device.
        device: where the model is.
        after_step: called after each step.

    Returns:
        The loss of each step, and its seconds: reading the batch, training, ``after_step``.
    """
    losses = []
    clock = StepClock(device)
    setup.model.train()
    for images, labels in batches:
        with setup.step():
            setup.optimizer.zero_grad()
            loss = F.cross_entropy(setup.network(images), labels)
            loss.backward()
            setup.optimizer.step()
        if setup.scheduler is not None:
            setup.scheduler.step()
        losses.append(loss.detach())
        after_step()
        clock.tick()
    return torch.stack(losses).tolist(), clock.seconds()


class StepClock:
    """Times steps without making the GPU wait for the host."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._marks = [self._clock.now()]

    def tick(self) -> None:
        """A step is over."""
        self._marks.append(self._clock.now())

    def seconds(self) -> list[float]:
        """Seconds between the ticks."""
        return [self._clock.seconds(start, end) for start, end in pairwise(self._marks)]


@torch.no_grad()
def predict(model: nn.Module, data: ImageData, device: torch.device) -> Tensor:
    """The model's output for the test images, ``[N, C]`` on the CPU, in eval mode."""
    model.eval()
    batches = data.test_batches(EVALUATION_BATCH, device)
    return torch.cat([model(images).cpu() for images, _ in batches])
