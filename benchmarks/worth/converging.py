"""Freezing by what the training shows: layers freeze when they seem to have converged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import fastfreeze
from benchmarks.training_rivals import HYPERS, Task, Training
from fastfreeze.schedule import Cosine

Layers = Sequence[Sequence[Tensor]]  # the parameters of each


class Rule(Protocol):
    """Which layers are to freeze, in order from the input."""

    def see_step(self) -> None:
        """A step has been taken; its gradients are still there."""

    def first_to_train(self, first: int) -> int:
        """At an epoch's end: the first layer that goes on, of those from ``first`` on."""


class GradientNorms:
    """AutoFreeze's rule (Liu et al., 2021), here once an epoch.

    With ``g`` the sum of a layer's gradients over an epoch, and ``h`` that over the epoch before,
    the layer's change is ``| ||g|| - ||h|| | / ||h||``. From the input on, layers freeze whose
    change is not above the median of all layers that train.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._sums = [[torch.zeros_like(p) for p in layer] for layer in layers]
        self._before: list[float] | None = None

    def see_step(self) -> None:
        for layer, sums in zip(self._layers, self._sums, strict=True):
            for p, total in zip(layer, sums, strict=True):
                if p.grad is not None:
                    total.add_(p.grad)

    def first_to_train(self, first: int) -> int:
        before, self._before = self._before, [_norm(sums) for sums in self._sums]
        for sums in self._sums:
            torch._foreach_zero_(sums)
        if before is None:
            return first
        pairs = list(zip(self._before, before, strict=True))[first:]
        changes = [abs(new - old) / old for new, old in pairs]
        limit = np.median(changes)
        return first + next((i for i, x in enumerate(changes) if x > limit), len(changes))


class Movement:
    """From the input on, layers freeze that move little.

    An epoch's movement of weights w is ``||w - w_before|| / ||w_before||``; it is little below
    ``share`` times the largest of the epochs until now.
    """

    def __init__(self, layers: Layers, share: float) -> None:
        self._layers, self._share = layers, share
        self._before = [[p.detach().clone() for p in layer] for layer in layers]
        self._largest = [0.0] * len(layers)

    def see_step(self) -> None:
        pass

    def first_to_train(self, first: int) -> int:
        goes_on = [self._moves_on(i) for i in range(first, len(self._layers))]
        return first + next((i for i, goes in enumerate(goes_on) if goes), len(goes_on))

    @torch.no_grad()
    def _moves_on(self, i: int) -> bool:
        before, now = self._before[i], self._layers[i]
        moved = _norm([a - b for a, b in zip(now, before, strict=True)]) / _norm(before)
        for old, new in zip(before, now, strict=True):
            old.copy_(new)
        self._largest[i] = max(self._largest[i], moved)
        return moved >= self._share * self._largest[i]


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(part.double().pow(2).sum().item() for part in parts))


def converging(
    task: Task, rule: Callable[[Layers], Rule], anneal_epochs: float, *, trimmed: bool
) -> Training:
    """A cosine, and layers that freeze for good where the rule says so, but never the head.

    Args:
        task: what it trains on.
        rule: is made for the layers but the head.
        anneal_epochs: how long a layer's rate takes to fall to zero, by half a cosine, from where
            it is; the layer freezes then.
        trimmed: whether the model runs by :func:`fastfreeze.trim`.
    """
    model = task.build().to(memory_format=torch.channels_last)
    plan = fastfreeze.split(model, task.images[:2])
    *layers, head = [list(layer.trainable) for layer in plan.layers]
    groups = [{"params": params} for params in (*layers, head)]
    optimizer = torch.optim.SGD(groups, task.lr, fused=True, **HYPERS)
    judge = rule(layers)
    anneal = round(anneal_epochs * task.steps_per_epoch)
    ends: list[int] = []  # the step at which each layer begins to anneal, from the input on
    cosine, fall = Cosine(task.total_steps), Cosine(max(1, anneal))

    def after_step(taken: int) -> None:
        judge.see_step()
        if taken % task.steps_per_epoch == 0:
            ends.extend([taken] * (judge.first_to_train(len(ends)) - len(ends)))
        for i, group in enumerate(optimizer.param_groups):
            begin = ends[i] if i < len(ends) else taken
            group["lr"] = cosine.lr(begin, task.lr)
            if i < len(ends) and taken - begin < anneal:
                group["lr"] *= fall.lr(taken - begin, 1.0)
            elif i < len(ends):
                for p in layers[i]:
                    p.requires_grad_(False).grad = None
                for name in plan.layers[i].modules:
                    model.get_submodule(name).eval()

    network = fastfreeze.trim(model) if trimmed else model
    return Training(
        model,
        lambda images, ids: network(images),
        optimizer,
        after_step,
        torch.channels_last,
        notes=lambda: {"froze_at": [step / task.steps_per_epoch for step in ends]},
    )
