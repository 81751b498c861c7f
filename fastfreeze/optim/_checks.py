"""What SGD refuses: arguments, steps and groups. Nothing here changes anything."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfreeze.schedule import Cosine, Schedule, Segment, check_initial_lr

Group = Mapping[str, Any]


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


def check_number(name: str, value: Any) -> None:
    """Raise unless it is a number, a NumPy scalar or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must have one element, got shape {tuple(value.shape)}")
        return
    try:
        if isinstance(value, (str, bytes)):  # float() would read '0.1'
            raise TypeError
        float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def as_step(name: str, value: Any, schedule: Schedule | None) -> int:
    """The step as an int; TypeError or ValueError unless it is an integer within the schedule."""
    wanted = ">= 0" if schedule is None else f"in 0..{schedule.total_steps}"
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        step = None if is_bool else operator.index(value)
    except TypeError:
        step = None
    if step is None:
        raise TypeError(f"{name} must be an integer {wanted}, got {value!r}")
    if step < 0 or (schedule is not None and step > schedule.total_steps):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return step


def check_group_rate(schedule: Schedule, g: int, name: str, value: Any) -> None:
    """Raise unless it can be group ``g``'s learning rate at the start of the schedule."""
    check_number(f"{name} of parameter group {g}", value)
    try:
        check_initial_lr(schedule, float(value))
    except ValueError as error:
        raise ValueError(f"parameter group {g}: {error}") from None


def check_scheduled_groups(
    schedule: Schedule, groups: Iterable[Group]
) -> list[tuple[Segment, ...]]:
    """The segments of each group; raises unless all can follow the schedule."""
    groups = list(groups)
    for g, group in enumerate(groups):
        name = "initial_lr" if "initial_lr" in group else "lr"
        check_group_rate(schedule, g, name, group[name])
    if not schedule.freezes:
        return [schedule.segments()] * len(groups)
    for g, group in enumerate(groups):
        if "layer_index" not in group:
            raise ValueError(
                f"schedule {type(schedule).__name__} freezes layer by layer, but parameter group "
                f"{g} has no 'layer_index': pass fastfreeze.split(model).param_groups()"
            )
        _check_int(f"layer_index of parameter group {g}", group["layer_index"], minimum=0)
    most = max((group["layer_index"] for group in groups), default=0) + 1
    return [schedule.segments(*_layer_of(g, group, most)) for g, group in enumerate(groups)]


def _layer_of(g: int, group: Group, most: int) -> tuple[int, int]:
    layer, layers = group["layer_index"], group.get("num_layers", most)
    _check_int(f"num_layers of parameter group {g}", layers, minimum=1)
    if layer >= layers:
        raise ValueError(
            f"layer_index of parameter group {g} must be in 0..{layers - 1}, as its num_layers is "
            f"{layers}, got {layer}"
        )
    return layer, layers


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")


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
