"""One training from start to end: its CPU seconds and its multiply-accumulates (MACs)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_rivals import Task, Training
from benchmarks.worth.question import Method
from fastfreeze.execution import Event, parameter_bits, run_events


def cpu_seconds() -> float:
    """Of this process and its children, since it began."""
    return sum(os.times()[:4])


def _alone(x: Tensor) -> tuple[Tensor, ...]:
    return (x,)


def trained(
    method: Method,
    task: Task,
    counted: bool,
    arguments: Callable[[Tensor], tuple[Tensor, ...]] = _alone,
) -> tuple[nn.Module, dict]:
    """Train; the model, and "seconds" and "macs" of all that was done from the first line on.

    Args:
        method: whose ``make`` gives the training.
        task: what it trains on.
        counted: whether to count MACs, whose own time is in the seconds.
        arguments: what the model is called with, of a batch's ``x``.
    """
    start = cpu_seconds()
    training: Training = method.make(task)
    meter = Meter(training.model, method.keeps, arguments) if counted else None
    for step in range(task.total_steps):
        x, labels, ids = task.batch(step)
        if meter is not None:
            meter.add(x, ids)
        training.step(x, labels, ids)
    seconds = cpu_seconds() - start
    return training.model, {
        "seconds": round(seconds, 3),
        "macs": None if meter is None else round(meter.macs),
        **training.notes(),
    }


@torch.no_grad()
def judged(logits: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, size: int = 250) -> dict:
    """ "error" and "nll" of a model in eval mode."""
    outputs = torch.cat([logits(batch) for batch in x.split(size)])
    wrong = (outputs.argmax(1) != labels).double().mean()
    return {"error": wrong.item(), "nll": F.cross_entropy(outputs, labels).item()}


@dataclass(frozen=True)
class _Stretch:
    """Operations that read the same parameters: what they depend on, own reads, and FLOPs."""

    upstream: int
    own: int
    forward: int
    backward: int


def _stretches(events: list[Event], bits: dict[str, int]) -> Iterator[_Stretch]:
    own = 0
    for event in events:
        own = 0 if event.parameter is None else own | bits[event.parameter]
        yield _Stretch(event.upstream, own, event.forward_flops, event.backward_flops)
        if event.forward_flops:  # else the next parameter is read by the same product
            own = 0


class Meter:
    """Counts the MACs of a training's steps from one run of its model on a sample.

    Of a product, the gradient of a frozen parameter is not computed, nor is that of an input that
    depends on nothing that trains. Where values are kept, the forward of what depends on nothing
    that trains counts once for each sample, until it becomes less.

    Args:
        model: in training; what requires a gradient when a step begins is trained by it.
        keeps: whether values are kept.
        arguments: what the model is called with, of a batch's ``x``.
    """

    def __init__(
        self, model: nn.Module, keeps: bool, arguments: Callable[[Tensor], Any] = _alone
    ) -> None:
        self.macs = 0.0
        self._model, self._keeps, self._arguments = model, keeps, arguments
        self._bits = parameter_bits(model)
        self._of_shape: dict[torch.Size, list[_Stretch]] = {}
        self._costs: dict[tuple[torch.Size, int], tuple[float, float]] = {}
        self._kept: dict[int, int] = {}  # of each sample: what trained when it was kept

    def add(self, x: Tensor, ids: Tensor) -> None:
        """A step on a batch is about to be taken."""
        trained = sum(self._bits[n] for n, p in self._model.named_parameters() if p.requires_grad)
        step, _ = self._cost(x, trained)
        self.macs += len(ids) * step
        if not self._keeps:
            return
        for sample in ids.tolist():
            before = self._kept.get(sample)
            if before is not None and trained & ~before == 0:
                self.macs -= self._cost(x, before)[1]
            self._kept[sample] = trained

    def _cost(self, x: Tensor, trained: int) -> tuple[float, float]:
        """A sample's MACs in a step, and those of them that need not be done again."""
        key = x.shape[1:], trained
        if key not in self._costs:
            if key[0] not in self._of_shape:
                self._of_shape[key[0]] = self._run(x)
            self._costs[key] = _macs(self._of_shape[key[0]], trained)
        return self._costs[key]

    def _run(self, x: Tensor) -> list[_Stretch]:
        model = copy.deepcopy(self._model).requires_grad_(True)
        events = run_events(model, self._arguments(x[:1]))
        return list(_stretches(events, self._bits))


def _macs(stretches: list[_Stretch], trained: int) -> tuple[float, float]:
    total = prefix = 0.0
    for s in stretches:
        upstream, own = s.upstream & trained, s.own & trained
        total += s.forward
        if not upstream:
            prefix += s.forward
            continue
        both = upstream & ~s.own and (own or not s.own)
        total += s.backward if both else min(s.forward, s.backward)
    return total / 2, prefix / 2
