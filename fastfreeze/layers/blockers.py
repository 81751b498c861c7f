"""What keeps the backward of a frozen prefix alive: one trained parameter is enough."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastfreeze.layers.costs import Stretch, stretches
from fastfreeze.layers.execution import gradient_bits, run_events
from fastfreeze.layers.split import LayerPlan
from fastfreeze.trimming.trimmed import TrimmedModel

Parameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class BackwardBlocker:
    """A parameter that trains below something frozen. As a string: a sentence.

    Attributes:
        parameter: its qualified name.
        share: how much of the backward of the frozen prefix runs because of it, in 0..1, by FLOPs.
            The whole backward is two gradients for each matrix product or convolution; of a frozen
            one, that of its input may run, a half. Shares overlap: each of two blockers keeps alive
            what lies between both and the prefix's end.
    """

    parameter: str
    share: float

    def __str__(self) -> str:
        return f"{self.parameter} still trains: {self.share:.0%} of the prefix's backward runs"


def backward_blockers(
    network: nn.Module, example_inputs: Any, *, plan: LayerPlan | None = None
) -> list[BackwardBlocker]:
    """The parameters that keep the backward of the frozen prefix alive, by the present flags.

    The prefix reaches up to where it fits the ``requires_grad`` flags best: fewest elements train
    before its end or are frozen behind it; of two ends that fit alike it is the later. Blockers are
    the parameters that train and on which an operation in the prefix depends.

    Args:
        network: a model, trimmed or not; it is left as it was.
        example_inputs: a tensor, a tuple of its positional arguments or a dict of keyword
            arguments. The model runs on them once, with gradients off.
        plan: the model's layers. The prefix then consists of whole layers, in their order; without,
            of parameters, in the order in which they are last used.

    Returns:
        The blockers, that of the greatest share first.

    Raises:
        ValueError: the model does not run on ``example_inputs``, or ``plan`` is of another model.
    """
    model = checked_model(network, plan)
    events = run_events(model, example_inputs)
    if plan is None:
        names = [event.parameter for event in events if event.parameter is not None]
        by_last_use = reversed(dict.fromkeys(reversed(names)))
        groups: list[Parameters] = [[(name, model.get_parameter(name))] for name in by_last_use]
    else:
        groups = [layer.parameters for layer in plan.layers]
    prefix = itertools.chain(*groups[: _best_end(groups)])
    return blockers_below(model, stretches(model, events), {name for name, _ in prefix})


def checked_model(network: nn.Module, plan: LayerPlan | None) -> nn.Module:
    """The model of a network, trimmed or not, which ``plan`` must be of."""
    model = network.model if isinstance(network, TrimmedModel) else network
    if plan is not None and plan.model is not model:
        raise ValueError(f"plan must be of this {type(model).__name__}, but is of another model")
    return model


def blockers_below(
    model: nn.Module, run: Iterable[Stretch], prefix: Collection[str]
) -> list[BackwardBlocker]:
    """The parameters that train, and on which operations depend that belong to the ``prefix``."""
    bits = gradient_bits(model)
    trained = sum(bits.values())
    inside = [stretch for stretch in run if stretch.parameter in prefix]
    whole = 2 * sum(stretch.forward for stretch in inside)
    found = []
    for name, bit in bits.items():
        below = [stretch for stretch in inside if stretch.upstream & bit]
        if below:
            alive = sum(stretch.left(trained) for stretch in below)
            found.append(BackwardBlocker(name, alive / max(whole, 1)))
    return sorted(found, key=lambda blocker: -blocker.share)


def _best_end(groups: Sequence[Parameters]) -> int:
    """The number of groups in the prefix that fits the flags best."""
    trained = [sum(p.numel() for _, p in group if p.requires_grad) for group in groups]
    frozen = [sum(p.numel() for _, p in group if not p.requires_grad) for group in groups]
    gains = [f - t for t, f in zip(trained, frozen, strict=True)]
    fits = list(itertools.accumulate(gains, initial=0))
    return max(range(len(fits)), key=lambda end: (fits[end], end))
