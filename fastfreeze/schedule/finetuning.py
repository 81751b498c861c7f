"""Schedules for pretrained networks: a fixed prefix, and layers that thaw from the head down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from fastfreeze.checks import check_float, check_int
from fastfreeze.schedule.base import Schedule
from fastfreeze.schedule.segments import Segment


@dataclass(frozen=True, kw_only=True)
class Frozen(Schedule):
    """The first layers never train; the others do, by :class:`Cosine`.

    A name or a share is for a plan to resolve: give the schedule to ``split``, and the schedule of
    the plan that it returns (``plan.schedule``) to the optimizer.

    Args:
        total_steps, warmup_steps, layer_decay: as in :class:`Schedule`.
        until: the first layer that trains: its index, 1 or more; its name, or that of a module
            which it is in; or, in (0, 1), the share of a training step's FLOPs, forward and
            backward, that the frozen layers have at most: as many freeze as fit into it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of its range.
    """

    until: int | str | float
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.until, int):
            check_int("until", self.until, minimum=1)
        elif not isinstance(self.until, str):
            check_float("until", self.until, "in (0, 1), a layer's index or its name")
            if not 0 < self.until < 1:
                raise ValueError(
                    "until must be a share in (0, 1), a layer's index or its name, got "
                    f"{self.until!r}"
                )

    def for_layers(self, names: Sequence[str], costs: Sequence[float] | None) -> Schedule:
        if isinstance(self.until, int):
            return self
        if isinstance(self.until, str):
            return replace(self, until=_named(self.until, names))
        if not costs or not sum(costs):
            raise ValueError(
                f"until={self.until!r} is a share of the compute, which the plan does not know: "
                "give split an example input"
            )
        share = float(self.until) * sum(costs)
        first = sum(cost <= share for cost in accumulate(costs))
        if not first:
            raise ValueError(
                f"until={self.until!r} freezes no layer: layer 0 alone has "
                f"{costs[0] / sum(costs):.3f} of the compute"
            )
        return replace(self, until=first)

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        if not isinstance(self.until, int):
            raise ValueError(
                f"until={self.until!r} is for a plan to resolve: give the schedule to split(model, "
                "example_inputs, schedule=...), and the schedule of the plan that it returns "
                "(plan.schedule) to the optimizer"
            )
        if self.until > head:
            raise ValueError(f"until must be in 1..{head}, as the head trains, got {self.until}")
        return (Segment(0, 0 if i < self.until else self.total_steps),)


@dataclass(frozen=True, kw_only=True)
class GradualUnfreezing(Schedule):
    """The head trains first, then layer by layer what is before it (ULMFiT, section 3.3).

    Of layers 0..N, layer i is frozen until step ``s_i = (N - i) * unfreeze_every`` and trains from
    there to the end: ``lr_i(step) = initial_lr * layer_decay ** (N - i) / 2 *
    (1 + cos(pi * (step - s_i) / (total_steps - s_i)))``. Its optimizer state starts as new.
    ``layer_decay=1 / 2.6`` and one epoch's steps for ``unfreeze_every`` are the paper's choice.

    Args:
        total_steps, warmup_steps, layer_decay: as in :class:`Schedule`.
        unfreeze_every: steps from one layer's start to the next one's, >= 1. Layer 0 must get to
            train: ``N * unfreeze_every`` must be below ``total_steps``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of its range.
    """

    unfreeze_every: int
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("unfreeze_every", self.unfreeze_every, minimum=1)

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        last = head * self.unfreeze_every
        if last >= self.total_steps:
            raise ValueError(
                f"unfreeze_every={self.unfreeze_every} would start layer 0 of {head + 1} at step "
                f"{last}, which must be below total_steps={self.total_steps}"
            )
        start = (head - i) * self.unfreeze_every
        trains = Segment(start, self.total_steps - start)
        return (trains,) if start == 0 else (Segment(0, 0), trains)


def _named(until: str, names: Sequence[str]) -> int:
    """Index of the first layer of this name, or inside the module of this name."""
    found = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{until}.")]
    if not found:
        raise ValueError(f"until must be one of the layers {list(names)}, got {until!r}")
    if found[0] == 0:
        raise ValueError(f"until={until!r} freezes no layer: it is layer 0")
    return found[0]
