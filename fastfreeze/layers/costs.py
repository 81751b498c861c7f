"""What each layer of a plan costs in a training step, and what of it is left under freezing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from fastfreeze.clock import Clock
from fastfreeze.layers.execution import Event, gradient_bits, parameter_bits
from fastfreeze.layers.split import LayerPlan

Part = tuple[str, int]  # forward and backward of a layer, "update" and "rest" of layer 0
Marks = list[tuple[Part, Any]]  # what has ended, and a reading of the clock
_REST: Part = ("rest", 0)


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a step in which all layers train, all in one unit.

    Attributes:
        forward, backward, update: of each layer.
        rest: of what belongs to no layer, and stays.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    update: tuple[float, ...]
    rest: float

    def step(self, frozen: Collection[int], alive: Sequence[float]) -> float:
        """Cost of a step with the layers ``frozen``, ``alive`` of each backward, all forwards."""
        backward = sum(b * share for b, share in zip(self.backward, alive, strict=True))
        update = sum(u for i, u in enumerate(self.update) if i not in frozen)
        return self.rest + sum(self.forward) + backward + update

    def step_without_prefix(self, frozen: Collection[int], alive: Sequence[float]) -> float:
        """The same without the forwards of the layers that have no backward left."""
        gone = sum(f for f, share in zip(self.forward, alive, strict=True) if share == 0)
        return self.step(frozen, alive) - gone


class Stretch(NamedTuple):
    """Operations that belong to one parameter, the one that was read last.

    Attributes:
        upstream, own: bits of the parameters on which they depend, and which they read.
        forward, backward: their FLOPs.
    """

    parameter: str | None
    upstream: int
    own: int
    forward: int
    backward: int

    def left(self, trained: int) -> int:
        """FLOPs of the backward if the parameters of these bits train.

        Of a product, the gradient of a frozen parameter is gone, and so is that of an input that
        depends on nothing else that trains.
        """
        upstream = self.upstream & trained
        if not upstream:
            return 0
        both = upstream & ~self.own and (upstream & self.own or not self.own)
        return self.backward if both else min(self.forward, self.backward)


def stretches(model: nn.Module, events: Sequence[Event]) -> Iterator[Stretch]:
    """The stretches of a run."""
    bits = parameter_bits(model)
    parameter, own = None, 0
    for event in events:
        if event.parameter is None:
            own = 0
        else:
            parameter, own = event.parameter, own | bits[event.parameter]
        forward, backward = event.forward_flops, event.backward_flops
        yield Stretch(parameter, event.upstream, own, forward, backward)
        if forward:  # else the next parameter is read by the same product: a weight, its bias
            own = 0


class LayerFlops:
    """FLOPs of a plan's layers, from the events of a run with everything trainable."""

    def __init__(self, plan: LayerPlan, events: Sequence[Event]) -> None:
        self.stretches = list(stretches(plan.model, events))
        self._bits, self._layers = gradient_bits(plan.model), plan.layers
        self._homes = {name: layer.index for layer in plan.layers for name, _ in layer.parameters}

    def costs(self) -> LayerCosts:
        """The costs in FLOPs, which know of forward and backward alone."""
        forward, backward = ([0.0] * len(self._layers) for _ in range(2))
        for s in self.stretches:
            forward[self._home(s)] += s.forward
            backward[self._home(s)] += s.backward
        return LayerCosts(tuple(forward), tuple(backward), (0.0,) * len(forward), 0.0)

    def alive(self, frozen: Collection[int]) -> list[float]:
        """The share of each layer's backward, in 0..1, that is left with the layers ``frozen``."""
        trained = sum(bit for name, bit in self._bits.items() if self._homes[name] not in frozen)
        whole, left, any_left = ([0.0] * len(self._layers) for _ in range(3))
        for s in self.stretches:
            layer = self._home(s)
            whole[layer] += s.backward
            left[layer] += s.left(trained)
            any_left[layer] = 1.0 if s.upstream & trained else any_left[layer]
        return [x / w if w else a for x, w, a in zip(left, whole, any_left, strict=True)]

    def _home(self, stretch: Stretch) -> int:
        return 0 if stretch.parameter is None else self._homes[stretch.parameter]


@contextmanager
def profiled(plan: LayerPlan, optimizer: Optimizer, clock: Clock) -> Iterator[Marks]:
    """Hooks around one training step of the plan's model; they are removed on leaving.

    Each mark says what ends with it: a layer's forward as each of its modules returns, its backward
    as each gradient of its parameters is there, the update, and the rest.
    """
    marks: Marks = [(_REST, clock.now())]

    def ends(kind: str, index: int = 0) -> Callable[..., None]:
        return lambda *_: marks.append(((kind, index), clock.now()))

    hooks = [
        plan.model.register_forward_pre_hook(ends("rest")),
        optimizer.register_step_pre_hook(ends("rest")),
        optimizer.register_step_post_hook(ends("update")),
    ]
    for layer in plan.layers:
        inside = [m for name in layer.modules for m in plan.model.get_submodule(name).modules()]
        ends_forward, ends_backward = ends("forward", layer.index), ends("backward", layer.index)
        hooks += [m.register_forward_hook(ends_forward) for m in dict.fromkeys(inside)]
        hooks += [p.register_post_accumulate_grad_hook(ends_backward) for p in layer.trainable]
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield marks
        marks.append((_REST, clock.now()))


def measured_costs(plan: LayerPlan, profiles: Sequence[Marks], clock: Clock) -> LayerCosts:
    """Seconds of each part, medians over the profiles; the update's by numbers of elements."""
    totals = [_seconds(marks, clock) for marks in profiles]

    def median(kind: str, index: int = 0) -> float:
        return statistics.median(seconds[kind, index] for seconds in totals)

    sizes = [sum(p.numel() for p in layer.trainable) for layer in plan.layers]
    update = median("update") / max(sum(sizes), 1)
    return LayerCosts(
        forward=tuple(median("forward", i) for i in range(len(sizes))),
        backward=tuple(median("backward", i) for i in range(len(sizes))),
        update=tuple(update * size for size in sizes),
        rest=median("rest"),
    )


def _seconds(marks: Marks, clock: Clock) -> defaultdict[Part, float]:
    """Of each part, what has passed up to its marks since the marks before."""
    seconds: defaultdict[Part, float] = defaultdict(float)
    for (_, start), (part, end) in pairwise(marks):
        seconds[part] += clock.seconds(start, end)
    return seconds
