"""Learning-rate schedules as pure functions of the step.

A schedule is described by :class:`Segment` s: on each one the learning rate follows half a cosine
from ``scale * initial_lr`` down to ``eta_min``, or the layer is frozen. The same few numbers per
layer are all that a kernel needs to compute the learning rate itself.

Steps count from 0: the first update of a run happens at step 0, the last at ``total_steps - 1``.

Sources: Snapshot Ensembles (Huang et al., ICLR 2017, eq. 2); FreezeOut (Brock et al., 2017).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, SupportsFloat, overload

import numpy as np
import numpy.typing as npt

HowScale = Literal["linear", "squared", "cubic"]
Composition = Literal["sticky", "last_k", "thaw"]
FloatArray = npt.NDArray[np.float64]

_POWERS: dict[str, int] = {"linear": 1, "squared": 2, "cubic": 3}


@dataclass(frozen=True)
class Segment:
    """One stretch of a layer's schedule.

    Attributes:
        start: first step of the stretch; it lasts until the next segment's start.
        length: steps in which the cosine would fall to its minimum. ``inf`` keeps the learning
            rate constant; 0 means that the layer is frozen.
        scale: factor on the parameter group's ``initial_lr``.
    """

    start: int
    length: float
    scale: float = 1.0

    @property
    def frozen(self) -> bool:
        """Whether the layer does not train on this segment."""
        return self.length == 0


def cosine_lr(
    step: npt.ArrayLike,
    start: npt.ArrayLike,
    length: npt.ArrayLike,
    scale: npt.ArrayLike,
    initial_lr: npt.ArrayLike,
    eta_min: float = 0.0,
) -> FloatArray:
    """Learning rates at steps on segments, all arguments broadcast together.

    ``eta_min + (scale * initial_lr - eta_min) * (0.5 * (1 + cos(pi * (step - start) / length)))``,
    held at its minimum once ``length`` steps have gone by; 0 where ``length`` is 0 (frozen).

    Returns:
        float64, of the broadcast shape.
    """
    step, start, length, scale, initial_lr = (
        np.asarray(x, dtype=np.float64) for x in (step, start, length, scale, initial_lr)
    )
    frozen = length == 0
    phase = np.minimum((step - start) / np.where(frozen, 1.0, length), 1.0)
    factor = 0.5 * (1.0 + np.cos(np.pi * phase))
    highest = scale * initial_lr
    return np.where(frozen, 0.0, eta_min + (highest - eta_min) * factor)


def segments_lr(
    segments: Sequence[Segment],
    step: int | npt.NDArray[np.int64],
    initial_lr: float,
    eta_min: float = 0.0,
) -> FloatArray:
    """:func:`cosine_lr` of each step on the segment that holds it.

    Args:
        segments: of a layer, by start.
        step: one or an array of any shape, 0-based.
        initial_lr, eta_min: as in :func:`cosine_lr`.

    Returns:
        float64, of ``step``'s shape.
    """
    steps = np.asarray(step)
    rows = np.array([(s.start, s.length, s.scale) for s in segments])
    start, length, scale = rows[_segment_index(segments, steps)].T
    lrs: FloatArray = cosine_lr(steps.T, start, length, scale, initial_lr, eta_min).T
    return lrs


@dataclass(frozen=True)
class Schedule(ABC):
    """What every schedule can answer. Layers count from 0, the one nearest the input.

    Attributes:
        total_steps: number of optimizer steps in the whole run, at least 1.
    """

    total_steps: int

    def __post_init__(self) -> None:
        _check_int("total_steps", self.total_steps, minimum=1)

    @abstractmethod
    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        """The layer's segments, by start; the first starts at step 0.

        Raises:
            ValueError: ``layer_index`` is not in ``0..num_layers-1``.
        """

    @property
    def eta_min(self) -> float:
        """Lower bound of the learning rate of a layer that trains."""
        return 0.0

    @property
    def freezes(self) -> bool:
        """Whether any layer is ever frozen, so that layers must be known."""
        return False

    @property
    def cycle_ends(self) -> tuple[int, ...]:
        """Numbers of completed steps after which a cycle is over, and a snapshot due."""
        return (self.total_steps,)

    @overload
    def lr(
        self, step: int, initial_lr: float, layer_index: int = 0, num_layers: int = 1
    ) -> float: ...
    @overload
    def lr(
        self,
        step: Sequence[int] | npt.NDArray[np.int64],
        initial_lr: float,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> FloatArray: ...
    def lr(
        self, step: Any, initial_lr: float, layer_index: int = 0, num_layers: int = 1
    ) -> float | FloatArray:
        """Learning rate of a layer at a step, or at each step of an array.

        Args:
            step: 0-based step(s), in ``0..total_steps``. At ``total_steps`` training is over, and
                the value is where the last segment arrives.
            initial_lr: learning rate at the start of the first cycle, before any scaling; > 0.
            layer_index, num_layers: the layer's position, and how many layers there are.

        Returns:
            A float, or a float64 array of the shape of ``step``.

        Raises:
            TypeError, ValueError: a step outside the range, ``initial_lr`` no number or below
                ``eta_min``, or a bad layer.
        """
        segments = self.segments(layer_index, num_layers)
        check_initial_lr(self, initial_lr)
        steps = np.asarray(step)
        if steps.size and not (steps.min() >= 0 and steps.max() <= self.total_steps):  # NaN too
            raise ValueError(f"step must be in 0..{self.total_steps} (total_steps), got {step!r}")
        lrs = segments_lr(segments, steps, initial_lr, self.eta_min)
        return float(lrs) if np.ndim(step) == 0 else lrs

    def is_frozen(self, step: int, layer_index: int = 0, num_layers: int = 1) -> bool:
        """Whether the layer is frozen at ``step`` (0-based)."""
        segments = self.segments(layer_index, num_layers)
        return segments[int(_segment_index(segments, np.asarray(step)))].frozen

    def freeze_steps(self, layer_index: int = 0, num_layers: int = 1) -> tuple[int, ...]:
        """The steps at which the layer becomes frozen, in order; empty if it never does."""
        return tuple(
            s.start
            for s in self.segments(layer_index, num_layers)
            if s.frozen and s.start < self.total_steps
        )

    def frozen_share(self, layer_index: int = 0, num_layers: int = 1) -> float:
        """Share of the run's steps, in 0..1, at which the layer is frozen."""
        segments = self.segments(layer_index, num_layers)
        ends = [s.start for s in segments[1:]] + [self.total_steps]
        frozen = sum(end - s.start for s, end in zip(segments, ends, strict=True) if s.frozen)
        return frozen / self.total_steps

    def frozen_layers(self, num_layers: int) -> tuple[tuple[int, frozenset[int]], ...]:
        """What is frozen when: pairs of a first step and the indices of all layers frozen then.

        In order; each lasts until the next one's first step, the last until the run's end.
        """
        rows = [self.segments(i, num_layers) for i in range(num_layers)]
        found: list[tuple[int, frozenset[int]]] = []
        for step in sorted({s.start for row in rows for s in row if s.start < self.total_steps}):
            now = [row[int(_segment_index(row, np.asarray(step)))] for row in rows]
            frozen = frozenset(i for i, segment in enumerate(now) if segment.frozen)
            if not found or found[-1][1] != frozen:
                found.append((step, frozen))
        return tuple(found)

    def config(self) -> dict[str, Any]:
        """The schedule as plain data; :func:`from_config` makes it again."""
        arguments = asdict(self)
        if arguments.get("stages") is None:  # as in checkpoints from before there were any
            arguments.pop("stages", None)
        return {"name": type(self).__name__, **arguments}


@dataclass(frozen=True)
class Constant(Schedule):
    """The learning rate stays at ``initial_lr``."""

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
        return (Segment(0, math.inf),)


@dataclass(frozen=True, kw_only=True)
class _Annealed(Schedule):
    """A schedule with a lower bound."""

    eta_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate("eta_min", self.eta_min)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Annealed):
    """One cosine from ``initial_lr`` at step 0 to ``eta_min`` at ``total_steps``.

    ``eta_min + (initial_lr - eta_min) / 2 * (1 + cos(pi * step / total_steps))``
    """

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
        return (Segment(0, self.total_steps),)


@dataclass(frozen=True, kw_only=True)
class SnapshotCycles(_Annealed):
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
        _check_cycles(self.total_steps, self.num_cycles)

    @property
    def cycle_length(self) -> int:
        """Steps in every cycle but the last, which may be shorter."""
        return -(-self.total_steps // self.num_cycles)

    @property
    def cycle_ends(self) -> tuple[int, ...]:
        L = self.cycle_length
        return tuple(min((c + 1) * L, self.total_steps) for c in range(self.num_cycles))

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
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

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
        starts = {0: 1.0, self.milestones[0]: 0.1, self.milestones[1]: 0.01}  # the later one wins
        return tuple(Segment(start, math.inf, scale) for start, scale in starts.items())


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

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
        head = num_layers - 1
        last = _last_of_stage(layer_index, head, self.stages)
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
            _check_int("k", self.k, minimum=1, maximum=self.num_cycles)
        elif self.k is not None:
            raise ValueError(f"k is for composition='last_k' alone, got k={self.k!r}")

    @property
    def freezes(self) -> bool:
        return True

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        _check_layer(layer_index, num_layers)
        if self.composition == "sticky":
            return self._sticky(layer_index, num_layers - 1)
        return self._thawing(layer_index, num_layers - 1)

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


def from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.config` described.

    Raises:
        ValueError: an unknown name, or arguments that the schedule does not take.
    """
    known = (Constant, Cosine, SnapshotCycles, StepDecay, FreezeOut, FreezeOutCycles)
    kinds = {c.__name__: c for c in known}
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in kinds:
        raise ValueError(f"schedule name must be one of {sorted(kinds)}, got {name!r}")
    try:
        return kinds[name](**arguments)
    except TypeError as error:
        raise ValueError(f"bad arguments for schedule {name}: {error}") from error


def check_initial_lr(schedule: Schedule, initial_lr: float, name: str = "initial_lr") -> None:
    """Raise unless ``initial_lr`` (``name`` in errors) is finite and fits ``schedule.eta_min``."""
    _check_rate(name, initial_lr)
    if initial_lr < schedule.eta_min:
        raise ValueError(
            f"eta_min must not exceed the initial learning rate {initial_lr!r}, "
            f"got {schedule.eta_min!r}"
        )


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


def _segment_index(
    segments: Sequence[Segment], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Index of the segment that holds each step."""
    return np.searchsorted([s.start for s in segments], steps, side="right") - 1


def _check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    wanted = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {wanted}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_number(name: str, value: Any, wanted: str) -> None:
    """What ``float`` takes, NumPy's numbers and tensors of one element among it, but no text."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}")


def _check_rate(name: str, value: Any) -> None:
    _check_number(name, value, ">= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def _check_layer(layer_index: int, num_layers: int) -> None:
    _check_int("num_layers", num_layers, minimum=1)
    _check_int("layer_index", layer_index, minimum=0, maximum=num_layers - 1)


def _check_cycles(total_steps: int, num_cycles: int) -> None:
    _check_int("num_cycles", num_cycles, minimum=1)
    if num_cycles > total_steps:
        raise ValueError(
            f"num_cycles must be at most total_steps={total_steps}, got num_cycles={num_cycles}"
        )
    length = -(-total_steps // num_cycles)
    possible = -(-total_steps // length)
    if possible != num_cycles:
        raise ValueError(
            f"num_cycles={num_cycles} does not fit total_steps={total_steps}: cycles of "
            f"ceil({total_steps}/{num_cycles}) = {length} steps give {possible}; "
            f"use num_cycles={possible}, or more steps"
        )


def _check_freezeout(t_0: float, how_scale: str, scale_lr: bool, stages: int | None) -> None:
    _check_number("t_0", t_0, "in (0, 1]")
    if not 0 < t_0 <= 1:
        raise ValueError(f"t_0 must be in (0, 1], got {t_0!r}")
    if how_scale not in _POWERS:
        raise ValueError(f"how_scale must be one of {list(_POWERS)}, got {how_scale!r}")
    if not isinstance(scale_lr, bool):  # any text would count as True
        raise TypeError(f"scale_lr must be a bool, got {scale_lr!r}")
    if stages is not None:
        _check_int("stages", stages, minimum=1)
