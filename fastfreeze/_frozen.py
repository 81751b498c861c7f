"""What parameters went through, so that the next run on them can tell: a freeze, a plan.

Both are notes beside the parameters, held weakly: a copy of a model starts without them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastfreeze.schedule import Schedule

_FROZEN = WeakTensorKeyDictionary()
_PLANNED = WeakTensorKeyDictionary()


def note_frozen(parameters: Iterable[nn.Parameter]) -> None:
    """A schedule has frozen them."""
    for parameter in parameters:
        _FROZEN[parameter] = True


def note_thawed(parameters: Iterable[nn.Parameter]) -> None:
    """They train again; those that were not frozen by a schedule are no error."""
    for parameter in parameters:
        _FROZEN.pop(parameter, None)


def frozen_by_schedule(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that a schedule has frozen and that have not been thawed since, by whomever."""
    return [p for p in parameters if p in _FROZEN and not p.requires_grad]


def note_plan(
    parameters: Iterable[nn.Parameter], schedule: Schedule | None, lr: float | None
) -> None:
    """Groups of them were made from a plan with this schedule and learning rate."""
    for parameter in parameters:
        _PLANNED[parameter] = (schedule, lr)


def planned(parameters: Iterable[nn.Parameter]) -> tuple[Schedule | None, float | None] | None:
    """Schedule and learning rate of the latest plan that gave groups of these parameters.

    None where there was no plan, or where plans differ, as of two models in one optimizer.
    """
    plans = [_PLANNED[p] for p in parameters if p in _PLANNED]
    return plans[0] if plans and all(plan == plans[0] for plan in plans) else None
