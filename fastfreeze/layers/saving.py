"""FreezeOut's t_0 from the saving that is wanted."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Literal

from fastfreeze.layers.split import LayerPlan
from fastfreeze.schedule import FreezeOut, HowScale

SavingOf = Literal["compute", "backward"]
_STEPS = 10_000  # t_0 is a multiple of 1 / _STEPS, so that it can be written down as it is


def freezeout_for_saving(
    plan: LayerPlan,
    saving: float,
    total_steps: int,
    *,
    of: SavingOf = "compute",
    how_scale: HowScale = "cubic",
    scale_lr: bool = True,
    stages: int | None = None,
) -> FreezeOut:
    """The FreezeOut schedule that is predicted to save as much as wanted.

    The larger t_0, the longer each layer trains and the less is saved: this is the largest t_0 of
    four decimals whose prediction (:attr:`LayerPlan.compute_saving` or ``backward_saving``) is at
    least ``saving``. Predictions count FLOPs; what a run saves in time, ``FreezeReport`` tells.

    Args:
        plan: what ``split`` returned for the model and an example input. Its schedule is ignored.
        saving: share of the whole run that is to be saved, in (0, 1).
        total_steps: optimizer steps in the run.
        of: the share of what: "compute" (forward and backward) or "backward".
        how_scale, scale_lr, stages: as in :class:`FreezeOut`.

    Raises:
        ValueError: no t_0 saves so much (the message tells how much can be saved, and at which
            t_0), the plan was made without an example input, or an argument is out of its range.
    """
    if not 0 < saving < 1:
        raise ValueError(f"saving must be in (0, 1), got {saving!r}")
    if of not in ("compute", "backward"):
        raise ValueError(f"of must be 'compute' or 'backward', got {of!r}")

    def schedule(step: int) -> FreezeOut:
        t_0 = step / _STEPS
        return FreezeOut(
            total_steps, t_0=t_0, how_scale=how_scale, scale_lr=scale_lr, stages=stages
        )

    def predicted(step: int) -> float:
        scheduled = replace(plan, schedule=schedule(step))
        found = scheduled.compute_saving if of == "compute" else scheduled.backward_saving
        if found is None:
            raise ValueError("plan must come from split(model, example_inputs), which counts FLOPs")
        return found

    highest = predicted(1)
    if saving > highest:
        raise ValueError(
            f"saving must be at most {highest:.4f} of the {of}, which t_0={1 / _STEPS} is "
            f"predicted to save, got {saving!r}"
        )
    steps = range(1, _STEPS + 1)
    return schedule(steps[bisect_right(steps, -saving, key=lambda step: -predicted(step)) - 1])
