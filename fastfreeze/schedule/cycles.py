"""Schedules of whole networks: one rate for all layers, or one that restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastfreeze.checks import check_int
from fastfreeze.schedule.base import Annealed, Schedule
from fastfreeze.schedule.segments import Segment


@dataclass(frozen=True)
class Constant(Schedule):
    """The learning rate stays at ``initial_lr``."""

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        return (Segment(0, math.inf),)


@dataclass(frozen=True, kw_only=True)
class Cosine(Annealed):
    """One cosine from ``initial_lr`` at step 0 to ``eta_min`` at ``total_steps``.

    ``eta_min + (initial_lr - eta_min) / 2 * (1 + cos(pi * step / total_steps))``
    """

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        return (Segment(0, self.total_steps),)


@dataclass(frozen=True, kw_only=True)
class SnapshotCycles(Annealed):
    """Cyclic cosine annealing (Snapshot Ensembles, eq. 2).

    With ``L = ceil(total_steps / num_cycles)``:
    ``lr(step) = initial_lr / 2 * (cos(pi * (step mod L) / L) + 1)``.
    Where ``num_cycles`` does not divide ``total_steps`` the last cycle is cut short.

    Args:
        total_steps: optimizer steps in the run.
        eta_min: lower bound of the learning rate, >= 0.
        num_cycles: cycles, and so snapshots; 1 to ``total_steps``.

    Raises:
        ValueError: more cycles than steps, or a number that cycles of L steps cannot give.
    """

    num_cycles: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_cycles", self.num_cycles, minimum=1)
        steps, cycles, length = self.total_steps, self.num_cycles, self.cycle_length
        if cycles > steps:
            raise ValueError(
                f"num_cycles must be at most total_steps={steps}, got num_cycles={cycles}"
            )
        possible = -(-steps // length)
        if possible != cycles:
            raise ValueError(
                f"num_cycles={cycles} does not fit total_steps={steps}: cycles of "
                f"ceil({steps}/{cycles}) = {length} steps give {possible}; "
                f"use num_cycles={possible}, or more steps"
            )

    @property
    def cycle_length(self) -> int:
        """Steps in every cycle but the last, which may be shorter."""
        return -(-self.total_steps // self.num_cycles)

    @property
    def cycle_ends(self) -> tuple[int, ...]:
        L = self.cycle_length
        return tuple(min((c + 1) * L, self.total_steps) for c in range(self.num_cycles))

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        L = self.cycle_length
        return tuple(Segment(c * L, L) for c in range(self.num_cycles))


@dataclass(frozen=True, kw_only=True)
class StepDecay(SnapshotCycles):
    """Snapshots at the same steps, but without cycles ("NoCycle" in Snapshot Ensembles, table 1).

    The learning rate is ``initial_lr``, a tenth of it from half of the steps on, and a hundredth
    from three quarters on (He et al., 2016). ``eta_min`` has no effect.
    """

    @property
    def milestones(self) -> tuple[int, int]:
        """The first steps at a tenth and at a hundredth of the rate."""
        return self.total_steps // 2, 3 * self.total_steps // 4

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        starts = {0: 1.0, self.milestones[0]: 0.1, self.milestones[1]: 0.01}  # the later one wins
        return tuple(Segment(start, math.inf, scale) for start, scale in starts.items())
