"""What freezing was to save, and what it saves: a row for each freeze event of a training run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastfreeze.clock import Clock
from fastfreeze.errors import warn
from fastfreeze.layers.blockers import BackwardBlocker, blockers_below, checked_model
from fastfreeze.layers.costs import LayerCosts, LayerFlops, Marks, measured_costs, profiled
from fastfreeze.layers.execution import run_events
from fastfreeze.layers.split import Layer, LayerPlan
from fastfreeze.text import format_table, ranges, some

_PROFILED_STEPS = 5
_FIRST_STEPS = 2  # in which a run warms up, and the cut moves after an event: they do not count
_KEPT_STEPS = 100
_NOTE = """\
step time after an event, relative to before it. predicted, from {source}:
without the backward and the update of what is frozen; limit: without its forward as well;
measured: medians"""


@dataclass(frozen=True)
class FreezeRow:
    """One event: from a step on, other layers are frozen than before.

    Attributes:
        step: how many steps were done; fastfreeze's optimizers count those of a resumed run too.
        frozen: indices of all layers that are frozen from here on.
        thawed: of those that were frozen before, and train again.
        predicted: time of a step after the event, relative to one before it, if the backward and
            the update of what is frozen are gone and its forward runs as before. Above 1 at a thaw.
        limit: the same if its forward is gone too.
        before: median seconds of the latest 100 steps between this event and the one before it.
            The first two, which move the cut, do not count. None if there are no others.
        after: the same after the event.
        blockers: what keeps the backward of frozen layers alive.
    """

    step: int
    frozen: tuple[int, ...]
    thawed: tuple[int, ...]
    predicted: float
    limit: float
    before: float | None
    after: float | None
    blockers: tuple[BackwardBlocker, ...]

    @property
    def measured(self) -> float | None:
        """Time of a step after the event, relative to one before it; None if not known."""
        return None if self.before is None or self.after is None else self.after / self.before


@dataclass
class _Stage:
    """The steps between two events, and readings of the clock around the latest of them."""

    step: int
    frozen: tuple[int, ...]
    blockers: tuple[BackwardBlocker, ...] = ()
    readings: deque[tuple[Any, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))


class FreezeReport:
    """Predicted and measured saving of every freeze event. ``print(report)`` shows a table.

    ::

        report = fastfreeze.FreezeReport(network, optimizer, plan, images)
        for images, labels in loader:
            with report.step():
                optimizer.zero_grad()
                loss_function(network(images), labels).backward()
                optimizer.step()

    Predictions rest on the time that each layer takes in the forward and in the backward. It is
    measured in up to five of the first steps, by hooks that are then removed; if not all parameters
    train in these, FLOPs take its place (:attr:`source` tells). The first layer that still trains
    has no gradient of its input to compute: by its share of the layer's FLOPs, that is saved too.

    A report changes no number of the training. It reads the clock twice in a step, and lets the
    host wait for a GPU only when rows are read.

    Args:
        network: what is trained: a model, trimmed or not, but not a compiled one.
        optimizer: its optimizer.
        plan: the model's layers. One is frozen if most of its elements do not require grad.
        example_inputs: a tensor, a tuple of the model's positional arguments or a dict of keyword
            arguments. The model runs on them once, with gradients off.

    Raises:
        ValueError: ``plan`` is of another model, or that does not run on ``example_inputs``.

    Warns:
        FastfreezeWarning: at an event, that something keeps the backward of frozen layers alive.
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, plan: LayerPlan, example_inputs: Any
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        if not isinstance(plan, LayerPlan):
            raise TypeError(f"plan must be a LayerPlan, got {type(plan).__name__}")
        model = checked_model(network, plan)
        self._optimizer, self._plan = optimizer, plan
        self._flops = LayerFlops(plan, run_events(model, example_inputs))
        self._clock = Clock(next(model.parameters()).device)
        self._profiles: list[Marks] = []
        self._first: int = getattr(optimizer, "current_step", 0)
        self._num_steps = self._first
        self._stages = [_Stage(self._first, self._frozen_layers())]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step, that of the optimizer included."""
        start = self._clock.now()
        if self._may_profile():
            with profiled(self._plan, self._optimizer, self._clock) as profile:
                yield
            self._profiles.append(profile)
        else:
            yield
        self._num_steps += 1
        stage = self._stages[-1]
        if self._num_steps - stage.step > _FIRST_STEPS:
            stage.readings.append((start, self._clock.now()))
        frozen = self._frozen_layers()
        if frozen != stage.frozen:
            self._stages.append(_Stage(self._num_steps, frozen, self._blockers(frozen)))

    @property
    def source(self) -> str:
        """What predictions rest on."""
        count = len(self._profiles)
        return f"the layers' times in {count} steps" if count else "FLOPs"

    @property
    def rows(self) -> tuple[FreezeRow, ...]:
        """The events so far, in order."""
        costs = self._flops.costs()
        if self._profiles:
            costs = measured_costs(self._plan, self._profiles, self._clock)
        rows = []
        for before, after in pairwise(self._stages):
            cost, last_cost = (self._cost(costs, stage) for stage in (after, before))
            row = FreezeRow(
                step=after.step,
                frozen=after.frozen,
                thawed=tuple(sorted({*before.frozen} - {*after.frozen})),
                predicted=cost[0] / last_cost[0],
                limit=cost[1] / last_cost[1],
                before=self._seconds(before),
                after=self._seconds(after),
                blockers=after.blockers,
            )
            rows.append(row)
        return tuple(rows)

    def _cost(self, costs: LayerCosts, stage: _Stage) -> tuple[float, ...]:
        """Of a step with all forwards, and of one without those of the frozen prefix."""
        alive = self._flops.alive(stage.frozen)
        return tuple(f(stage.frozen, alive) for f in (costs.step, costs.step_without_prefix))

    @property
    def summary(self) -> str:
        """What all freezes so far made of a step's time, and in a line of its own, all thaws."""
        runs: dict[str, list[list[FreezeRow]]] = {"freezing": [], "thawing": []}
        for thaws, run in groupby(self.rows, lambda row: bool(row.thawed)):
            runs["thawing" if thaws else "freezing"].append(list(run))
        lines = [_in_words(kind, found) for kind, found in runs.items() if found]
        return "\n".join(lines) or "no layer has been frozen or thawed yet"

    def __str__(self) -> str:
        rows = self.rows
        if not rows:
            return self.summary
        columns = {
            "step": [str(row.step) for row in rows],
            "frozen layers": [ranges(row.frozen) for row in rows],
            "predicted": [_number(row.predicted) for row in rows],
            "limit": [_number(row.limit) for row in rows],
            "measured": [_number(row.measured) for row in rows],
            "ms before": [_number(row.before, 1e3, 1) for row in rows],
            "ms after": [_number(row.after, 1e3, 1) for row in rows],
        }
        table = format_table(list(columns), list(zip(*columns.values(), strict=True)))
        sentences = [f"step {row.step}: {blocker}" for row in rows for blocker in row.blockers]
        note = _NOTE.format(source=self.source)
        return "\n".join([table, "", self.summary, note, *sentences])

    def _may_profile(self) -> bool:
        if self._num_steps - self._first < _FIRST_STEPS or len(self._profiles) == _PROFILED_STEPS:
            return False
        return all(p.requires_grad for p in self._plan.model.parameters())

    def _frozen_layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self._plan.layers if _mostly_frozen(layer))

    def _blockers(self, frozen: tuple[int, ...]) -> tuple[BackwardBlocker, ...]:
        layers = [self._plan.layers[i] for i in frozen]
        held = any(not set(layer.held_by) <= set(frozen) for layer in layers)
        parameters = dict(p for layer in layers for p in layer.parameters)
        if not held and not any(p.requires_grad for p in parameters.values()):
            return ()
        found = tuple(blockers_below(self._plan.model, self._flops.stretches, parameters))
        if found:
            text = some([str(blocker) for blocker in found])
            warn(f"step {self._num_steps}: {text}")
        return found

    def _seconds(self, stage: _Stage) -> float | None:
        times = [self._clock.seconds(start, end) for start, end in stage.readings]
        return statistics.median(times) if times else None


def _mostly_frozen(layer: Layer) -> bool:
    trained = sum(p.numel() for _, p in layer.parameters if p.requires_grad)
    return 2 * trained < sum(p.numel() for _, p in layer.parameters)


def _in_words(kind: str, runs: Sequence[Sequence[FreezeRow]]) -> str:
    """What events of one kind did, in runs that no other kind interrupts.

    A run is measured from its first row to its last: there may be no time for one between them.
    """
    rows = [row for run in runs for row in run]
    times = [(run[0].before, run[-1].after) for run in runs]
    ratios = [after / before for before, after in times if before and after is not None]
    measured = math.prod(ratios) if len(ratios) == len(times) else None
    predicted, limit = (math.prod(r.predicted for r in rows), math.prod(r.limit for r in rows))
    return (
        f"step time by {kind}: predicted {_number(predicted)}, limit {_number(limit)}, "
        f"measured {_number(measured)}"
    )


def _number(value: float | None, factor: float = 1.0, digits: int = 3) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"
