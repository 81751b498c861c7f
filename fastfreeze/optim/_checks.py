"""What optimizers refuse of their arguments. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastfreeze.layers.groups import check_number
from fastfreeze.schedule import Cosine, Schedule


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless these hyperparameters are numbers >= 0."""
    for name, value in values.items():
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def check_state_dtype(name: str, dtype: Any) -> None:
    """Raise ValueError unless state can be asked to be of this dtype."""
    if dtype not in (None, torch.float32):
        raise ValueError(f"{name} must be None or torch.float32, got {dtype}")


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
