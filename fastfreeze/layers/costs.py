"""What each layer of a plan costs in a training step, and what of it is left under freezing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastfreeze.clock import Clock
from fastfreeze.layers.execution import Event, gradient_bits
from fastfreeze.layers.split import LayerPlan

Part = tuple[str, int]
REST: Part = ("rest", 0)


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


@dataclass(frozen=True)
class _Stretch:
    """Operations of one layer that read the same parameters.

    Attributes:
        upstream, own: bits of the trainable parameters on which they depend, and which they read.
        forward, backward: their FLOPs.
    """

    layer: int
    upstream: int
    own: int
    forward: int
    backward: int


class LayerFlops:
    """FLOPs of a plan's layers, from the events of a run with everything trainable.

    An operation belongs to the layer whose parameter was read last.
    """

    def __init__(self, plan: LayerPlan, events: Sequence[Event]) -> None:
        self._bits = gradient_bits(plan.model)
        self._layers = plan.layers
        self._stretches = list(self._read(events))

    def costs(self) -> LayerCosts:
        """The costs in FLOPs, which know of forward and backward alone."""
        forward, backward = ([0.0] * len(self._layers) for _ in range(2))
        for s in self._stretches:
            forward[s.layer] += s.forward
            backward[s.layer] += s.backward
        return LayerCosts(tuple(forward), tuple(backward), (0.0,) * len(forward), 0.0)

    def alive(self, frozen: Collection[int]) -> list[float]:
        """The share of each layer's backward, in 0..1, that is left with the layers ``frozen``.

        Of a product, the gradient of a frozen parameter is gone, and so is that of an input that
        depends on nothing else that trains.
        """
        trained = sum(
            self._bits[name]
            for layer in self._layers
            if layer.index not in frozen
            for name, _ in layer.parameters
        )
        whole, left, any_left = ([0.0] * len(self._layers) for _ in range(3))
        for s in self._stretches:
            upstream = s.upstream & trained
            whole[s.layer] += s.backward
            if upstream:
                any_left[s.layer] = 1.0
                both = upstream & ~s.own and (upstream & s.own or not s.own)
                left[s.layer] += s.backward if both else min(s.forward, s.backward)
        return [x / w if w else a for x, w, a in zip(left, whole, any_left, strict=True)]

    def _read(self, events: Sequence[Event]) -> Iterator[_Stretch]:
        homes = {name: layer.index for layer in self._layers for name, _ in layer.parameters}
        layer = own = 0
        for event in events:
            if event.parameter is None:
                own = 0
            else:
                own |= self._bits[event.parameter]
                layer = homes[event.parameter]
            forward, backward = event.forward_flops, event.backward_flops
            yield _Stretch(layer, event.upstream, own, forward, backward)
            if forward:  # else the next parameter is read by the same product: a weight, its bias
                own = 0


class StepProfile:
    """The time of one training step, by parts: forward and backward of each layer, update, rest."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[Part, Any]] = [(REST, clock.now())]

    def end(self, part: Part) -> None:
        """What has run since the last call belongs to ``part``."""
        self._marks.append((part, self._clock.now()))

    def seconds(self) -> dict[Part, float]:
        total: dict[Part, float] = {}
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            total[part] = total.get(part, 0.0) + self._clock.seconds(start, end)
        return total


@contextmanager
def profiled(plan: LayerPlan, optimizer: Optimizer, clock: Clock) -> Iterator[StepProfile]:
    """Hooks around one training step of the plan's model; they are removed on leaving.

    A layer's forward ends as each of its modules returns, its backward as each gradient of its
    parameters is there.
    """
    profile = StepProfile(clock)

    def ends(kind: str, index: int = 0) -> Callable[..., None]:
        return lambda *_: profile.end((kind, index))

    hooks = [
        plan.model.register_forward_pre_hook(ends("rest")),
        optimizer.register_step_pre_hook(ends("rest")),
        optimizer.register_step_post_hook(ends("update")),
    ]
    for layer in plan.layers:
        modules = _modules(plan, layer.modules)
        hooks += [m.register_forward_hook(ends("forward", layer.index)) for m in modules]
        hooks += [
            p.register_post_accumulate_grad_hook(ends("backward", layer.index))
            for p in layer.trainable
        ]
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield profile
        profile.end(REST)


def measured_costs(plan: LayerPlan, profiles: Sequence[StepProfile]) -> LayerCosts:
    """Seconds of each part, medians over the profiles; the update's by numbers of elements."""

    seconds = [profile.seconds() for profile in profiles]

    def median(kind: str, index: int = 0) -> float:
        return statistics.median(times.get((kind, index), 0.0) for times in seconds)

    sizes = [sum(p.numel() for p in layer.trainable) for layer in plan.layers]
    update = median("update") / max(sum(sizes), 1)
    return LayerCosts(
        forward=tuple(median("forward", i) for i in range(len(sizes))),
        backward=tuple(median("backward", i) for i in range(len(sizes))),
        update=tuple(update * size for size in sizes),
        rest=median("rest"),
    )


def _modules(plan: LayerPlan, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names, and those inside."""
    found = [m for name in names for m in plan.model.get_submodule(name).modules()]
    return list(dict.fromkeys(found))
