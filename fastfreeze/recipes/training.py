"""Ways to train, and the loop that they share: what a user would copy.

Each way is a function that sets up an optimizer; :func:`train_epoch` then runs any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fastfreeze.cache import FeatureCache
from fastfreeze.clock import Clock
from fastfreeze.layers.report import FreezeReport
from fastfreeze.layers.split import LayerPlan, split
from fastfreeze.optim import SGD, AdamW
from fastfreeze.recipes.data import ImageData
from fastfreeze.schedule import Cosine, Schedule
from fastfreeze.trimming import trim

EVALUATION_BATCH = 250
# Both papers: Nesterov momentum, and weight decay on every parameter.
_HYPERS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


@dataclass
class Setup:
    """What a method trains with."""

    model: nn.Module  # is evaluated and saved
    network: Callable[[Tensor], Tensor]  # what a training step calls: the model, or it trimmed
    optimizer: torch.optim.Optimizer  # steps and, with a schedule of its own, freezes
    schedule: Schedule
    scheduler: LRScheduler | None = None  # where the optimizer does not know the schedule
    plan: LayerPlan | None = None  # the layers, where some freeze
    cache: FeatureCache | None = None  # of the frozen prefix; called in the place of ``network``
    report: FreezeReport | None = None  # measures each step

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are frozen now."""
        frozen: tuple[int, ...] = getattr(self.optimizer, "frozen_layers", ())
        return frozen

    @property
    def rates(self) -> list[float]:
        """The learning rate of each layer, 0 where no group has it; of all where none freezes."""
        groups = {group.get("layer_index", 0): group["lr"] for group in self.optimizer.param_groups}
        count = 1 if self.plan is None else len(self.plan.layers)
        return [groups.get(layer, 0.0) for layer in range(count)]

    def forward(self, images: Tensor, samples: Tensor | None) -> Tensor:
        """What the network gives for a batch, ``samples`` being the images' indices."""
        if self.cache is None or samples is None:
            return self.network(images)
        output: Tensor = self.cache(images, samples=samples)
        return output


def set_up(model: nn.Module, schedule: Schedule, lr: float, example: Tensor) -> Setup:
    """The optimizer that a schedule asks for; where layers freeze, their backward is cut off."""
    if schedule.needs_layers:
        plan = split(model, example, schedule=schedule, lr=lr)
        optimizer = SGD(plan.param_groups(), lr, **_HYPERS, schedule=schedule)
        return Setup(model, trim(model), optimizer, schedule, plan=plan)
    if isinstance(schedule, Cosine) and not schedule.warmup_steps:
        return plain_sgd(model, schedule, lr)
    optimizer = SGD(model.parameters(), lr, **_HYPERS, schedule=schedule)
    return Setup(model, model, optimizer, schedule)


@dataclass(frozen=True)
class Method:
    """One way to train, as results and files call it.

    Attributes:
        name: a word without spaces.
        lr: learning rate at the start, > 0.
        schedule: makes one for a number of steps.
        set_up: makes a :class:`Setup` for a network, its schedule, ``lr`` and an example batch.
    """

    name: str
    lr: float
    schedule: Callable[[int], Schedule]
    set_up: Callable[[nn.Module, Schedule, float, Tensor], Setup] = set_up


def plain_sgd(model: nn.Module, schedule: Cosine, lr: float) -> Setup:
    """The baseline: torch's own optimizer and scheduler, in their fastest form."""
    optimizer = torch.optim.SGD(model.parameters(), lr, fused=True, **_HYPERS)
    scheduler = CosineAnnealingLR(optimizer, schedule.total_steps, schedule.eta_min)
    return Setup(model, model, optimizer, schedule, scheduler)


def fine_tuning(
    model: nn.Module, schedule: Schedule, lr: float, example: Tensor, *, optimizer: str, cache: bool
) -> Setup:
    """Pretrained layers are frozen as the schedule says; biases and norms do not decay.

    ``optimizer`` is "adamw" or "sgd". With ``cache``, a :class:`~fastfreeze.FeatureCache` keeps the
    frozen prefix's output for each image, which must be the same in each epoch.
    """
    plan = split(model, example, schedule=schedule, lr=lr)
    schedule, groups = plan.schedule or schedule, plan.param_groups(no_decay=True)
    sgd = optimizer == "sgd"
    steps = (SGD if sgd else AdamW)(groups, lr, schedule=schedule, **(_HYPERS if sgd else {}))
    network = trim(model)
    kept = FeatureCache(network) if cache else None
    return Setup(model, network, steps, schedule, plan=plan, cache=kept)


def train_epoch(
    setup: Setup,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    after_step: Callable[[], None],
    samples: Iterable[Tensor] | None = None,
) -> tuple[list[float], list[float]]:
    """One pass over the training images.

    Args:
        setup: a method's model and optimizer.
        batches: images and labels, on the device.
        device: where the model is.
        after_step: called after each step.
        samples: int64 ``[B]`` for each batch, the indices of its images; for a feature cache.

    Returns:
        The loss of each step, and its seconds: reading the batch, training, ``after_step``.
    """
    losses, clock = [], Clock(device)
    marks = [clock.now()]
    setup.model.train()
    indices: Iterable[Tensor | None] = repeat(None) if samples is None else samples
    for (images, labels), which in zip(batches, indices, strict=False):
        with nullcontext() if setup.report is None else setup.report.step():
            setup.optimizer.zero_grad()
            loss = F.cross_entropy(setup.forward(images, which), labels)
            loss.backward()
            setup.optimizer.step()
            if setup.scheduler is not None:
                setup.scheduler.step()
        losses.append(loss.detach())
        after_step()
        marks.append(clock.now())
    return torch.stack(losses).tolist(), [clock.seconds(*pair) for pair in pairwise(marks)]


@torch.no_grad()
def predict(model: nn.Module, data: ImageData, device: torch.device) -> Tensor:
    """The model's output for the test images, ``[N, C]`` on the CPU, in eval mode."""
    model.eval()
    batches = data.test_batches(EVALUATION_BATCH, device)
    return torch.cat([model(images).cpu() for images, _ in batches])
