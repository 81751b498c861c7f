"""One training from start to end: its CPU seconds and its multiply-accumulates (MACs)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfreeze
from benchmarks.training_rivals import Task, Training
from benchmarks.worth.question import Method
from fastfreeze.clock import cpu_seconds
from fastfreeze.layers.costs import LayerFlops
from fastfreeze.layers.execution import run_events

Sets = Mapping[str, tuple[Tensor, Tensor]]  # inputs and labels


def record(method: Method, task: Task, counted: bool, sets: Sets) -> dict:
    """Of a run: of its training, and the errors on sets, by what the names of these begin with.

    Where MACs are not counted, it is the seconds alone that are asked for.
    """
    model, found = trained(method, task, counted)
    if not counted:
        return found
    model.eval()
    return {**found, **judged(lambda x: task.logits(model(*task.arguments(x))), sets)}


def trained(method: Method, task: Task, counted: bool) -> tuple[nn.Module, dict]:
    """Train; the model, and "seconds" and "macs" of all that was done from the first line on.

    Args:
        method: whose ``make`` gives the training.
        task: what it trains on.
        counted: whether to count MACs, whose own time is in the seconds.
    """
    start = cpu_seconds()
    training: Training = method.make(task)
    meter = Meter(training.model, task.arguments) if counted else None
    for step in range(task.total_steps):
        x, labels, ids = task.batch(step)
        if meter is not None:
            meter.add(x)
        training.step(x, labels, ids)
        if meter is not None:
            meter.found(**training.notes())
    return training.model, {
        "seconds": round(cpu_seconds() - start, 3),
        "macs": None if meter is None else round(meter.macs),
        **training.notes(),
    }


@torch.no_grad()
def judged(logits: Callable[[Tensor], Tensor], sets: Sets, size: int = 250) -> dict:
    """ "error" and "nll" of a model in eval mode on each set."""
    found = {}
    for begin, (x, labels) in sets.items():
        outputs = torch.cat([logits(batch) for batch in x.split(size)])
        wrong = (outputs.argmax(1) != labels).double().mean()
        found[f"{begin}error"] = wrong.item()
        found[f"{begin}nll"] = F.cross_entropy(outputs, labels).item()
    return found


class Meter:
    """Counts the MACs of a training's steps from one run of its model on a sample.

    Of a product, the gradient of a frozen parameter is not computed, nor is that of an input that
    depends on nothing that trains.

    Args:
        model: in training; what requires a gradient when a step begins is trained by it.
        arguments: what the model is called with, of a batch's ``x``.
    """

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor], Any]) -> None:
        self.macs = 0.0
        self._model, self._arguments = model, arguments
        self._of_shape: dict[torch.Size, LayerFlops] = {}
        self._costs: dict[tuple[torch.Size, frozenset[int]], tuple[float, float]] = {}
        self._x, self._frozen, self._before = torch.empty(0), frozenset(), frozenset()
        self._seen = 0, 0, 0

    def add(self, x: Tensor) -> None:
        """A step on a batch is about to be taken."""
        frozen = frozenset(i for i, p in enumerate(self._model.parameters()) if not p.requires_grad)
        if frozen != self._frozen:
            self._before, self._frozen = self._frozen, frozen
        self._x = x
        self.macs += len(x) * self._cost(frozen)[0]

    def found(self, hits: int = 0, misses: int = 0, advanced: int = 0, **_: Any) -> None:
        """How many frozen values have been found so far, computed, or carried on from earlier ones.

        What does not depend on anything that trains was not computed for as much of the last batch.
        """
        seen = hits, misses, advanced
        step = [now - before for now, before in zip(seen, self._seen, strict=True)]
        self._seen = seen
        if total := sum(step):
            share = len(self._x) / total
            self.macs -= share * step[0] * self._cost(self._frozen)[1]
            self.macs -= share * step[2] * self._cost(self._before)[1]

    def _cost(self, frozen: frozenset[int]) -> tuple[float, float]:
        """A sample's MACs in a step, and those of them that depend on nothing that trains."""
        shape = self._x.shape[1:]
        if (shape, frozen) not in self._costs:
            if shape not in self._of_shape:
                self._of_shape[shape] = self._flops()
            flops = self._of_shape[shape]
            costs, alive = flops.costs(), flops.alive(frozen)
            step, rest = costs.step(frozen, alive), costs.step_without_prefix(frozen, alive)
            self._costs[shape, frozen] = step / 2, (step - rest) / 2
        return self._costs[shape, frozen]

    def _flops(self) -> LayerFlops:
        """Of the whole model, each parameter a layer of its own."""
        model = copy.deepcopy(self._model).requires_grad_(True)
        arguments = self._arguments(self._x[:1])
        names = [[name] for name, _ in model.named_parameters()]
        with warnings.catch_warnings():  # of parameters that are not used
            warnings.simplefilter("ignore")
            plan = fastfreeze.split(model, arguments, layers=names)
        return LayerFlops(plan, run_events(model, arguments))
