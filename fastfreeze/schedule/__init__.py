"""Learning-rate schedules as pure functions of the step.

A schedule is described by :class:`Segment` s: on each one the learning rate follows half a cosine
from ``scale * initial_lr`` down to ``eta_min``, or the layer is frozen. The same few numbers per
layer, and ``warmup_steps``, are all that a kernel needs to compute the learning rate itself.

Steps count from 0: the first update of a run happens at step 0, the last at ``total_steps - 1``.

Sources: Snapshot Ensembles (Huang et al., ICLR 2017, eq. 2); FreezeOut (Brock et al., 2017); ULMFiT
(Howard & Ruder, ACL 2018).
"""

from __future__ import annotations

from typing import Any

from fastfreeze.schedule.base import Schedule, check_initial_lr
from fastfreeze.schedule.cycles import Constant, Cosine, SnapshotCycles, StepDecay
from fastfreeze.schedule.finetuning import Frozen, GradualUnfreezing
from fastfreeze.schedule.freezeout import (
    Composition,
    FreezeOut,
    FreezeOutCycles,
    HowScale,
    freezeout_ratio,
)
from fastfreeze.schedule.segments import FloatArray, Segment, SegmentTable, cosine_lr

__all__ = [
    "Composition",
    "Constant",
    "Cosine",
    "FloatArray",
    "FreezeOut",
    "FreezeOutCycles",
    "Frozen",
    "GradualUnfreezing",
    "HowScale",
    "Schedule",
    "Segment",
    "SegmentTable",
    "SnapshotCycles",
    "StepDecay",
    "check_initial_lr",
    "cosine_lr",
    "freezeout_ratio",
    "from_config",
]

_KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        Constant,
        Cosine,
        SnapshotCycles,
        StepDecay,
        FreezeOut,
        FreezeOutCycles,
        Frozen,
        GradualUnfreezing,
    )
}


def from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.config` described.

    Raises:
        ValueError: an unknown name, or arguments that the schedule does not take.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in _KINDS:
        raise ValueError(f"schedule name must be one of {sorted(_KINDS)}, got {name!r}")
    try:
        return _KINDS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"bad arguments for schedule {name}: {error}") from error
