"""Segments, and the learning rates on them: what every kernel computes too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_AHEAD = 32  # steps computed at once: NumPy takes hardly longer for them than for one


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
    warmup_steps: int = 0,
) -> FloatArray:
    """Learning rates at steps on segments, all arguments broadcast together.

    ``eta_min + (scale * initial_lr - eta_min) * (0.5 * (1 + cos(pi * (step - start) / length)))``,
    held at its minimum once ``length`` steps have gone by, times ``min(1, (step + 1) /
    warmup_steps)`` where ``warmup_steps`` is not 0; 0 where ``length`` is 0 (frozen).

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
    warm = np.minimum((step + 1.0) / max(warmup_steps, 1), 1.0)
    return np.where(frozen, 0.0, (eta_min + (highest - eta_min) * factor) * warm)


class SegmentTable:
    """The segments of many groups, or of one, for all their learning rates at a step at once.

    Args:
        segments: of each group, by start.
        eta_min: lower bound of the learning rate of a group that trains.
        warmup_steps: over which all rates rise, 0 for none.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Segment, ...]],
        eta_min: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        longest = max(map(len, segments), default=0)
        padding = (math.inf, math.inf, 1.0)  # never begins
        rows = [
            [(s.start, s.length, s.scale) for s in group] + [padding] * (longest - len(group))
            for group in segments
        ]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), longest, 3)
        self._start, self._length, self._scale = np.moveaxis(table, 2, 0)
        self._eta_min, self._warmup_steps = eta_min, warmup_steps
        self._known: list[list[float]] = []  # rates of the steps from _first on
        self._first, self._initial = 0, b""

    def lrs(self, step: int, initial_lr: FloatArray) -> list[float]:
        """Each group's learning rate at ``step``, of ``initial_lr`` [groups]."""
        initial = initial_lr.tobytes()
        if initial != self._initial or not 0 <= step - self._first < len(self._known):
            self._known = self.rates(np.arange(step, step + _AHEAD), initial_lr).tolist()
            self._first, self._initial = step, initial
        return self._known[step - self._first]

    def rates(self, steps: npt.ArrayLike, initial_lr: npt.ArrayLike) -> FloatArray:
        """:func:`cosine_lr` [..., groups] at ``steps`` [...] on the segments that hold them."""
        steps = np.asarray(steps)[..., None]
        at = self._at(steps)
        start, length, scale = (a[at] for a in (self._start, self._length, self._scale))
        return cosine_lr(steps, start, length, scale, initial_lr, self._eta_min, self._warmup_steps)

    def frozen(self, step: int) -> set[int]:
        """The groups that are frozen at ``step``."""
        return set(np.flatnonzero(self._length[self._at(step)] == 0).tolist())

    def _at(self, steps: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the segments are that hold each group's ``steps`` [..., 1] or number."""
        rows = np.arange(len(self._start))
        return rows, (self._start <= np.asarray(steps)[..., None]).sum(-1) - 1
