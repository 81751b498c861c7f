"""Notes on parameters for the next run: a schedule froze them, a plan gave groups of them.

Notes are attributes of plain data: a weak reference would forbid ``torch.utils.swap_tensors``. Deep
copies and state dicts do not have them.
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
    for parameter in parameters:
        setattr(parameter, _FROZEN, True)


def note_thawed(parameters: Iterable[Tensor]) -> None:
    """They train again. It is no error if no schedule has frozen some of them."""
    for parameter in parameters:
        parameter.__dict__.pop(_FROZEN, None)


def frozen_by_schedule(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that a schedule has frozen.

    If the user has thawed some of them since, the others are frozen on purpose, and none counts.
    """
    marked = [p for p in parameters if hasattr(p, _FROZEN)]
    if any(p.requires_grad for p in marked):
        note_thawed(marked)
        return []
    return marked


def note_plan(parameters: Iterable[Tensor], schedule: Schedule | None, lr: float | None) -> None:
    """A plan with this schedule and learning rate gave groups of them."""
    plan: Plan = (None if schedule is None else schedule.config(), lr)
    for parameter in parameters:
        setattr(parameter, _PLAN, plan)
    if schedule is not None and schedule.freezes and not _LOOKS:
        _LOOKS.append(register_optimizer_step_pre_hook(_look_who_freezes))


_LOOKS: list[Any] = []  # the hook for the next optimizer that steps on a plan's groups


def _look_who_freezes(optimizer: Optimizer, *_: Any) -> None:
    """Warn, once, if an optimizer steps on a plan's groups and nobody freezes them."""
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
    """The schedule's configuration and the rate of the plan that gave groups of these last.

    None without a plan, or if plans differ, as those of two models in one optimizer do.
    """
    plans = [getattr(p, _PLAN) for p in parameters if hasattr(p, _PLAN)]
    return plans[0] if plans and all(plan == plans[0] for plan in plans) else None


def note_driven(optimizer: Optimizer) -> None:
    """A scheduler freezes its layers, and tells of what an earlier run has frozen."""
    setattr(optimizer, _DRIVEN, True)


def is_driven(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, _DRIVEN)
