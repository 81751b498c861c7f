"""What parameters went through, so that the next run on them can tell: a freeze, a plan.

The notes are attributes of the parameters, of plain data: a weak reference would keep
``torch.utils.swap_tensors`` from them. A deep copy and a state dict are without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastfreeze.errors import warn
from fastfreeze.schedule import Schedule

_FROZEN, _PLAN, _DRIVEN = "_fastfreeze_frozen", "_fastfreeze_plan", "_fastfreeze_driven"

Plan = tuple[dict[str, Any] | None, float | None]


def note_frozen(parameters: Iterable[Tensor]) -> None:
    """A schedule has frozen them."""
    for parameter in parameters:
        setattr(parameter, _FROZEN, True)


def note_thawed(parameters: Iterable[Tensor]) -> None:
    """They train again; those that were not frozen by a schedule are no error."""
    for parameter in parameters:
        parameter.__dict__.pop(_FROZEN, None)


def frozen_by_schedule(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that a schedule has frozen, unless the user has thawed some of them since.

    What is frozen then is so on purpose.
    """
    marked = [p for p in parameters if hasattr(p, _FROZEN)]
    if any(p.requires_grad for p in marked):
        note_thawed(marked)
        return []
    return marked


def note_plan(parameters: Iterable[Tensor], schedule: Schedule | None, lr: float | None) -> None:
    """Groups of them were made from a plan with this schedule and learning rate."""
    plan: Plan = (None if schedule is None else schedule.config(), lr)
    for parameter in parameters:
        setattr(parameter, _PLAN, plan)
    if schedule is not None and schedule.freezes and not _LOOKS:
        _LOOKS.append(register_optimizer_step_pre_hook(_look_who_freezes))


_LOOKS: list[Any] = []  # the hook for the next optimizer that steps on a plan's groups


def _look_who_freezes(optimizer: Optimizer, *_: Any) -> None:
    """Warn, once for a plan, if an optimizer steps on its groups and nobody freezes them."""
    groups = optimizer.param_groups
    if not all("layer_index" in group for group in groups):
        return
    plan = planned(p for group in groups for p in group["params"])
    if plan is None or plan[0] is None:
        return
    while _LOOKS:
        _LOOKS.pop().remove()
    # fastfreeze's own optimizers have told already.
    if not (is_driven(optimizer) or hasattr(optimizer, "schedule")):
        name = type(optimizer).__name__
        warn(
            f"split() was given schedule={plan[0]['name']}, and nobody freezes the groups of this "
            f"{name}: no layer will freeze. Make fastfreeze.FreezeScheduler(optimizer, "
            "plan.schedule) before the first step, and call its step() after the optimizer's"
        )


def planned(parameters: Iterable[Tensor]) -> Plan | None:
    """The schedule's configuration and the rate of the latest plan that gave groups of these.

    None where there was no plan, or where plans differ, as of two models in one optimizer.
    """
    plans = [getattr(p, _PLAN) for p in parameters if hasattr(p, _PLAN)]
    return plans[0] if plans and all(plan == plans[0] for plan in plans) else None


def note_driven(optimizer: Optimizer) -> None:
    """A scheduler freezes its layers, and tells of what an earlier run has frozen."""
    setattr(optimizer, _DRIVEN, True)


def is_driven(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, _DRIVEN)
