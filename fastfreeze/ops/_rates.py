"""Learning rates of many groups at once, step after step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastfreeze.schedule import Segment, cosine_lr

_AHEAD = 32  # steps computed at once: NumPy takes hardly longer for them than for one


class SegmentTable:
    """The segments of many groups, for all their learning rates at a step at once.

    Args:
        segments: of each group, by start.
        eta_min: lower bound of the learning rate of a group that trains.
    """

    def __init__(self, segments: Sequence[tuple[Segment, ...]], eta_min: float) -> None:
        longest = max(map(len, segments), default=0)
        padding = Segment(-1, math.inf)
        rows = [
            [(s.start, s.length, s.scale) for s in (*group, *[padding] * (longest - len(group)))]
            for group in segments
        ]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), longest, 3)
        self._start, self._length, self._scale = np.moveaxis(table, 2, 0)
        self._start[self._start < 0] = np.inf
        self._eta_min = eta_min
        self._known: list[list[float]] = []  # rates of the steps from _first on
        self._first, self._initial = 0, b""

    def lrs(self, step: int, initial_lr: npt.NDArray[np.float64]) -> list[float]:
        """Each group's :func:`cosine_lr` at ``step`` on the segment that holds it."""
        initial = initial_lr.tobytes()
        if initial != self._initial or not 0 <= step - self._first < len(self._known):
            self._known = self._rates(np.arange(step, step + _AHEAD)[:, None], initial_lr).tolist()
            self._first, self._initial = step, initial
        return self._known[step - self._first]

    def _rates(
        self, steps: npt.NDArray[np.int64], initial_lr: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Rates [steps, groups] at ``steps`` [steps, 1]."""
        rows = np.arange(len(self._start))
        at = (self._start <= steps[:, :, None]).sum(2) - 1
        start, length, scale = (a[rows, at] for a in (self._start, self._length, self._scale))
        return cosine_lr(steps, start, length, scale, initial_lr, self._eta_min)
