"""Parameter groups under a schedule: what they must be, and their learning rates."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.errors import warn
from fastfreeze.layers.frozen import frozen_by_schedule, planned
from fastfreeze.schedule import Schedule, Segment, check_initial_lr
from fastfreeze.text import ranges

Group = Mapping[str, Any]
# FreezeOut's scaling at its authors' settings stays below: 2 at t_0=0.8, 8 at 0.5, both cubic. A
# rate that is right for a network seldom is at ten times itself.
_MANY_TIMES = 10


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
    if not schedule.needs_layers:
        return [schedule.segments()] * len(groups)
    for g, group in enumerate(groups):
        if "layer_index" not in group:
            how = "freezes" if schedule.freezes else "sets rates"
            raise ValueError(
                f"schedule {type(schedule).__name__} {how} layer by layer, but parameter group "
                f"{g} has no 'layer_index': pass fastfreeze.split(model).param_groups()"
            )
        check_int(f"layer_index of parameter group {g}", group["layer_index"], minimum=0)
    most = max((group["layer_index"] for group in groups), default=0) + 1
    return [schedule.segments(*_layer_of(g, group, most)) for g, group in enumerate(groups)]


def _layer_of(g: int, group: Group, most: int) -> tuple[int, int]:
    layer, layers = group["layer_index"], group.get("num_layers", most)
    check_int(f"num_layers of parameter group {g}", layers, minimum=1)
    if layer >= layers:
        raise ValueError(
            f"layer_index of parameter group {g} must be in 0..{layers - 1}, as its num_layers is "
            f"{layers}, got {layer}"
        )
    return layer, layers


def tell_of_plan(groups: Sequence[Group], schedule: Schedule | None) -> None:
    """Warn if the groups come from a plan that was made for another schedule or learning rate.

    And if the schedule starts layers at many times the rate asked for. It raises as
    :func:`check_scheduled_groups` does.
    """
    message = None if schedule is None else _scaled_rates_message(groups, schedule)
    if message:
        warn(message)
    plan = planned(p for group in groups for p in group["params"])
    if plan is None or not all("layer_index" in group for group in groups):  # not its groups
        return
    config, lr = plan
    if config is not None and schedule is None:
        warn(
            f"split() was given schedule={config['name']}, and this optimizer has none: no layer "
            "will freeze. Pass schedule=plan.schedule to the optimizer too"
        )
    elif config is not None and schedule is not None and config != schedule.config():
        warn(
            f"split() was given schedule {config}, and this optimizer follows "
            f"{schedule.config()}: the plan tells of another run. Pass both the same schedule"
        )
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if (
        lr is not None
        and len(rates) == 1
        and not math.isclose(lr, rate := rates.pop(), rel_tol=1e-6)
    ):
        warn(
            f"split() was given lr={float(lr)}, and this optimizer starts from lr={rate}, which is "
            "what counts: the plan's table shows rates that no layer has. Pass both the same lr"
        )


def _scaled_rates_message(groups: Sequence[Group], schedule: Schedule) -> str | None:
    rows = check_scheduled_groups(schedule, groups)
    scales = [max((s.scale for s in row if not s.frozen), default=0.0) for row in rows]
    most = max(scales, default=0.0)
    if most <= _MANY_TIMES:
        return None
    chosen = [g for g, scale in enumerate(scales) if scale > _MANY_TIMES]
    group = groups[scales.index(most)]
    lr = float(group.get("initial_lr", group["lr"]))
    return (
        f"{layers_in_words(groups, chosen)} start at up to {most:.3g} times the learning rate "
        f"asked for, {most * lr:.3g} instead of {lr:.3g}: scale_lr=True gives layers that freeze "
        "early as much as the others. If training diverges, or starts from pretrained weights, "
        "pass scale_lr=False, or a larger t_0"
    )


def earlier_run_message(groups: Sequence[Group], frozen_now: Iterable[int]) -> str | None:
    """Which layers should train and are as an earlier run's schedule has frozen them, if any."""
    trains = {g: groups[g]["params"] for g in set(range(len(groups))) - set(frozen_now)}
    frozen = set(map(id, frozen_by_schedule(p for params in trains.values() for p in params)))
    fixed = {g for g, params in trains.items() if not frozen.isdisjoint(map(id, params))}
    if not fixed:
        return None
    return (
        f"{layers_in_words(groups, fixed)} do not train: the schedule of an earlier run has "
        "frozen parameters of theirs. Call model.requires_grad_(True) before a new run"
    )


def layers_in_words(groups: Sequence[Group], chosen: Iterable[int]) -> str:
    """The layers of some groups, such as "layers 0..3"."""
    return f"layers {ranges(layers_of(groups, chosen))}"


def layers_of(groups: Sequence[Group], chosen: Iterable[int]) -> list[int]:
    """Indices of the layers of some groups, rising; a group that names none is one itself."""
    return sorted({groups[g].get("layer_index", g) for g in chosen})
