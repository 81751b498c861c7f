"""Segments, and the learning rates on them: what every kernel computes too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


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


def segments_lr(
    segments: Sequence[Segment],
    step: int | npt.NDArray[np.int64],
    initial_lr: float,
    eta_min: float = 0.0,
    warmup_steps: int = 0,
) -> FloatArray:
    """:func:`cosine_lr` of each step on the segment that holds it.

    Args:
        segments: of a layer, by start.
        step: one or an array of any shape, 0-based.
        initial_lr, eta_min, warmup_steps: as in :func:`cosine_lr`.

    Returns:
        float64, of ``step``'s shape.
    """
    steps = np.asarray(step)
    rows = np.array([(s.start, s.length, s.scale) for s in segments])
    start, length, scale = rows[segment_index(segments, steps)].T
    lrs: FloatArray
    lrs = cosine_lr(steps.T, start, length, scale, initial_lr, eta_min, warmup_steps).T
    return lrs


def segment_index(
    segments: Sequence[Segment], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Index of the segment that holds each step."""
    return np.searchsorted([s.start for s in segments], steps, side="right") - 1
