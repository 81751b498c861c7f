"""What SGD refuses: arguments and steps. Nothing here changes anything."""

from __future__ import annotations

from torch import Tensor

from fastfreeze.layers.groups import check_number
from fastfreeze.schedule import Cosine, Schedule


def check_hypers(
    lr: float | Tensor, momentum: float, weight_decay: float, nesterov: bool, dampening: float
) -> None:
    """Raise TypeError or ValueError unless torch.optim.SGD's for-loop could take the arguments."""
    values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    for name, value in {**values, "dampening": dampening}.items():
        check_number(name, value)
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening 0, got momentum={momentum} and "
            f"dampening={dampening}"
        )


def schedule_of(schedule: Schedule | None, total_steps: int | None) -> Schedule | None:
    if schedule is None:
        return None if total_steps is None else Cosine(total_steps)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastfreeze Schedule, got {schedule!r}")
    if total_steps not in (None, schedule.total_steps):
        raise ValueError(
            f"total_steps must be the schedule's {schedule.total_steps} or left out, "
            f"got {total_steps}"
        )
    return schedule
