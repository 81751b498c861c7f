"""FreezeOut, alone and in cycles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastfreeze.checks import check_int
from fastfreeze.schedule._checks import check_number
from fastfreeze.schedule.base import Schedule
from fastfreeze.schedule.cycles import SnapshotCycles
from fastfreeze.schedule.segments import Segment

HowScale = Literal["linear", "squared", "cubic"]
Composition = Literal["sticky", "last_k", "thaw"]

_POWERS: dict[str, int] = {"linear": 1, "squared": 2, "cubic": 3}


@dataclass(frozen=True, kw_only=True)
class FreezeOut(Schedule):
    """Layer-wise cosine annealing to zero, then freezing (FreezeOut).

    Layer i of 0..N anneals over ``t_i = total_steps * ratio_i`` steps, with
    ``ratio_i = s(t_0 + (1 - t_0) * i / N)`` and ``s(x)`` = x, x**2 or x**3:
    ``lr_i(step) = lr0_i / 2 * (1 + cos(pi * step / t_i))``. It trains while ``step < t_i``. The
    last layer, the head, has ratio 1 and never freezes.

    Args:
        total_steps: optimizer steps in the run.
        t_0: share of the run, before ``s``, for which the first layer trains; in (0, 1].
        how_scale: "linear", "squared" or "cubic".
        scale_lr: start layer i at ``initial_lr / ratio_i``, so that every layer's learning rate
            integrates to the same sum.
        stages: freeze at this many steps at most, >= 1; None: each layer at its own. The layers but
            the head are put into so many runs of neighbours, as equal as can be, and each takes the
            ``ratio_i`` of the last of its run, for its cosine and ``scale_lr`` as well: no layer
            freezes before its time, and each still anneals to zero.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of its range.
    """

    t_0: float = 0.8
    how_scale: HowScale = "cubic"
    scale_lr: bool = True
    stages: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_freezeout(self.t_0, self.how_scale, self.scale_lr, self.stages)

    @property
    def freezes(self) -> bool:
        return True

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        last = _last_of_stage(i, head, self.stages)
        ratio = freezeout_ratio(last, head, self.t_0, self.how_scale)
        return _annealed_then_frozen(0, self.total_steps, self.total_steps, ratio, self.scale_lr)


@dataclass(frozen=True, kw_only=True)
class FreezeOutCycles(SnapshotCycles):
    """Snapshot cycles with FreezeOut inside them.

    Within a cycle that freezes, the layers that still train follow FreezeOut's formulae with the
    cycle's length in the place of ``total_steps``. ``composition`` says which cycles those are and
    what a restart does:

    * ``"sticky"``: from the second cycle on, each cycle anneals and freezes one further stretch of
      the prefix, which stays frozen, so that later snapshots share it bit for bit. With N the index
      of the head, cycle c (from 0) starts with its first ``floor(N * (c - 1) / (num_cycles - 1))``
      layers frozen; the last cycle freezes all but the head. Layers behind the stretch anneal over
      the full cycle.
    * ``"last_k"``: the last ``k`` cycles freeze layer by layer, and each restart thaws all.
    * ``"thaw"``: the same in every cycle.

    Args:
        total_steps, eta_min, num_cycles: as in :class:`SnapshotCycles`.
        t_0, how_scale, scale_lr: as in :class:`FreezeOut`; ``scale_lr`` counts in the cycles in
            which a layer freezes.
        stages: as in :class:`FreezeOut`, of the layers that freeze in a cycle, in each cycle.
        composition: "sticky", "last_k" or "thaw".
        k: for "last_k" alone: how many cycles freeze, 1 to ``num_cycles``.

    Raises:
        TypeError, ValueError: an argument out of its type or range, or ``k`` missing or misplaced.
    """

    t_0: float = 0.8
    how_scale: HowScale = "cubic"
    scale_lr: bool = True
    composition: Composition = "sticky"
    k: int | None = None
    stages: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_freezeout(self.t_0, self.how_scale, self.scale_lr, self.stages)
        if self.composition not in ("sticky", "last_k", "thaw"):
            raise ValueError(
                f"composition must be 'sticky', 'last_k' or 'thaw', got {self.composition!r}"
            )
        if self.composition == "sticky" and self.num_cycles < 2:
            raise ValueError("composition='sticky' freezes from the second cycle on: num_cycles=1")
        if self.composition == "last_k":
            if self.k is None:
                raise ValueError("composition='last_k' needs k, the number of cycles that freeze")
            check_int("k", self.k, minimum=1, maximum=self.num_cycles)
        elif self.k is not None:
            raise ValueError(f"k is for composition='last_k' alone, got k={self.k!r}")

    @property
    def freezes(self) -> bool:
        return True

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        if self.composition == "sticky":
            return self._sticky(i, head)
        return self._thawing(i, head)

    def first_active_layer(self, cycle: int, num_layers: int) -> int:
        """Lowest layer that trains when ``cycle`` (from 0, up to ``num_cycles``) starts.

        Above 0 for "sticky" alone: elsewhere each cycle starts with every layer training.
        """
        if self.composition != "sticky" or cycle <= 1 or self.num_cycles == 1:
            return 0
        return (num_layers - 1) * (cycle - 1) // (self.num_cycles - 1)

    def _sticky(self, i: int, head: int) -> tuple[Segment, ...]:
        L = self.cycle_length
        segments = [Segment(0, L)]
        for c in range(1, self.num_cycles):
            first = self.first_active_layer(c, head + 1)
            end = min((c + 1) * L, self.total_steps)
            behind = self.first_active_layer(c + 1, head + 1)
            if i >= behind:
                segments.append(Segment(c * L, L))
                continue
            last = _last_of_stage(i - first, behind - first, self.stages)
            ratio = freezeout_ratio(last, head - first, self.t_0, self.how_scale)
            segments += _annealed_then_frozen(c * L, L, end, ratio, self.scale_lr)
            if not segments[-1].frozen:  # annealed until the restart: stays frozen from there
                segments.append(Segment(end, 0))
            break
        return tuple(segments)

    def _thawing(self, i: int, head: int) -> tuple[Segment, ...]:
        L = self.cycle_length
        freezing = self.k if self.k is not None else self.num_cycles
        last = _last_of_stage(i, head, self.stages)
        ratio = freezeout_ratio(last, head, self.t_0, self.how_scale)
        segments: list[Segment] = []
        for c in range(self.num_cycles):
            if c < self.num_cycles - freezing:
                segments.append(Segment(c * L, L))
            else:
                end = min((c + 1) * L, self.total_steps)
                segments += _annealed_then_frozen(c * L, L, end, ratio, self.scale_lr)
        return tuple(segments)


def freezeout_ratio(layer_index: int, head_index: int, t_0: float, how_scale: HowScale) -> float:
    """Share of the run for which a layer trains: ``s(t_0 + (1 - t_0) * i / N)``; 1 for the head.

    Args:
        layer_index, head_index: i and N, 0 <= i <= N.
        t_0, how_scale: as in :class:`FreezeOut`.
    """
    if layer_index == head_index:
        return 1.0  # also N = 0, and free of rounding
    x = t_0 + (1.0 - t_0) * layer_index / head_index
    return math.pow(x, _POWERS[how_scale])


def _annealed_then_frozen(
    start: int, length: int, end: int, ratio: float, scale_lr: bool
) -> tuple[Segment, ...]:
    """A cosine over ``ratio * length`` steps from ``start``, then frozen if before ``end``."""
    anneal = length * ratio
    # Without the slack, 1000 * 0.8**2 = 640.0000000000001 would train step 640 at a rate of 1e-32.
    frozen_from = start + math.ceil(anneal - 1e-9 * length)
    segments = (Segment(start, anneal, 1.0 / ratio if scale_lr else 1.0),)
    return segments if frozen_from >= end else (*segments, Segment(frozen_from, 0))


def _last_of_stage(i: int, num_freezing: int, stages: int | None) -> int:
    """The last of the layers that freeze together with ``i``, if ``0..num_freezing-1`` freeze."""
    if stages is None or i >= num_freezing:
        return i
    stage = i * stages // num_freezing
    return -(-(stage + 1) * num_freezing // stages) - 1


def _check_freezeout(t_0: float, how_scale: str, scale_lr: bool, stages: int | None) -> None:
    check_number("t_0", t_0, "in (0, 1]")
    if not 0 < t_0 <= 1:
        raise ValueError(f"t_0 must be in (0, 1], got {t_0!r}")
    if how_scale not in _POWERS:
        raise ValueError(f"how_scale must be one of {list(_POWERS)}, got {how_scale!r}")
    if not isinstance(scale_lr, bool):  # any text would count as True
        raise TypeError(f"scale_lr must be a bool, got {scale_lr!r}")
    if stages is not None:
        check_int("stages", stages, minimum=1)
