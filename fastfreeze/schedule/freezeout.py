"""FreezeOut, alone and in cycles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastfreeze.checks import check_int, check_share
from fastfreeze.schedule.base import Schedule
from fastfreeze.schedule.cycles import SnapshotCycles
from fastfreeze.schedule.segments import Segment

HowScale = Literal["linear", "squared", "cubic"]
Composition = Literal["sticky", "last_k", "thaw"]

_POWERS: dict[str, int] = {"linear": 1, "squared": 2, "cubic": 3}


@dataclass(frozen=True, kw_only=True)
class _FreezesOut(Schedule):
    """What FreezeOut says of layers that anneal from one step on, and freeze."""

    t_0: float = 0.8
    how_scale: HowScale = "cubic"
    scale_lr: bool = True
    stages: int | None = None
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("t_0", self.t_0)
        if self.how_scale not in _POWERS:
            raise ValueError(f"how_scale must be one of {list(_POWERS)}, got {self.how_scale!r}")
        if not isinstance(self.scale_lr, bool):  # any text would count as True
            raise TypeError(f"scale_lr must be a bool, got {self.scale_lr!r}")
        if self.stages is not None:
            check_int("stages", self.stages, minimum=1)

    def _frozen_out(
        self, i: int, num_freezing: int, head: int, start: int, length: int, end: int
    ) -> tuple[Segment, ...]:
        """Layer ``i`` of 0..``head``, of which the first ``num_freezing`` freeze.

        It anneals over its share of ``length`` steps from ``start``, and is then frozen if that is
        before ``end``.
        """
        last = _last_of_stage(i, num_freezing, self.stages)
        ratio = freezeout_ratio(last, head, self.t_0, self.how_scale)
        anneal = length * ratio
        # Without the slack, 1000 * 0.8**2 = 640.0000000000001 would train step 640 at 1e-32.
        frozen_from = start + math.ceil(anneal - 1e-9 * length)
        segments = (Segment(start, anneal, 1.0 / ratio if self.scale_lr else 1.0),)
        return segments if frozen_from >= end else (*segments, Segment(frozen_from, 0))


@dataclass(frozen=True, kw_only=True)
class FreezeOut(_FreezesOut):
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

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        return self._frozen_out(i, head, head, 0, self.total_steps, self.total_steps)


@dataclass(frozen=True, kw_only=True)
class FreezeOutCycles(SnapshotCycles, _FreezesOut):
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

    composition: Composition = "sticky"
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def first_active_layer(self, cycle: int, num_layers: int) -> int:
        """Lowest layer that trains when ``cycle`` (from 0, up to ``num_cycles``) starts.

        Above 0 for "sticky" alone: elsewhere each cycle starts with every layer training.
        """
        if self.composition != "sticky" or cycle <= 1 or self.num_cycles == 1:
            return 0
        return (num_layers - 1) * (cycle - 1) // (self.num_cycles - 1)

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        L, sticky = self.cycle_length, self.composition == "sticky"
        segments: list[Segment] = []
        for c, end in enumerate(self.cycle_ends):
            first, behind = self._freezing_in(c, head)
            if i >= behind:
                segments.append(Segment(c * L, L))
                continue
            stretch = i - first, behind - first, head - first
            segments += self._frozen_out(*stretch, c * L, L, end)
            if sticky and not segments[-1].frozen:  # annealed until the restart
                segments.append(Segment(end, 0))
            if sticky:
                break
        return tuple(segments)

    def _freezing_in(self, cycle: int, head: int) -> tuple[int, int]:
        """The first of the layers that freeze in a cycle, and the first behind them."""
        if self.composition == "sticky":
            first, behind = (self.first_active_layer(c, head + 1) for c in (cycle, cycle + 1))
            return first, behind
        freezing = self.num_cycles if self.k is None else self.k
        return 0, head if cycle >= self.num_cycles - freezing else 0


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


def _last_of_stage(i: int, num_freezing: int, stages: int | None) -> int:
    """The last of the layers that freeze together with ``i``, if ``0..num_freezing-1`` freeze."""
    if stages is None or i >= num_freezing:
        return i
    stage = i * stages // num_freezing
    return -(-(stage + 1) * num_freezing // stages) - 1
