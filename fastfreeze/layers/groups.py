"""Parameter groups under a schedule: what they must be, their rates, how they freeze and thaw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.errors import warn
from fastfreeze.layers.frozen import frozen_by_schedule, note_frozen, note_thawed, planned
from fastfreeze.schedule import Schedule, Segment, SegmentTable, check_initial_lr
from fastfreeze.text import ranges

Group = Mapping[str, Any]
# At its authors' settings FreezeOut scales by less: by 2 at t_0=0.8, by 8 at 0.5, both cubic.
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
    step = value.item() if getattr(value, "shape", None) == () else value  # NumPy's and tensors
    check_int(name, step, minimum=0, maximum=None if schedule is None else schedule.total_steps)
    return int(step)


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


class FollowedGroups:
    """What a schedule says of an optimizer's groups at each step, and what it has frozen.

    Attributes:
        segments: of each group, by start.
        frozen: by group, the parameters that freezing has switched off until now.
        changes: the steps, above 0, at which a group freezes or thaws.

    Raises:
        TypeError, ValueError: groups that cannot follow the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Sequence[Group],
        frozen: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self.segments = check_scheduled_groups(schedule, groups)
        self.frozen = {} if frozen is None else frozen
        pairs = chain.from_iterable(map(pairwise, self.segments))
        self.changes = frozenset(now.start for old, now in pairs if now.frozen != old.frozen)
        self._last_step = schedule.total_steps - 1
        self._table = SegmentTable(self.segments, schedule.eta_min, schedule.warmup_steps)

    def lrs(self, step: int, initial_lrs: Sequence[float | Tensor]) -> list[float]:
        """Each group's learning rate at ``step``."""
        return self._table.lrs(step, np.array(list(map(float, initial_lrs))))

    def frozen_at(self, step: int) -> set[int]:
        """The groups that are frozen at ``step``; after the last one, those that were then."""
        return self._table.frozen(min(step, self._last_step))

    def check_count(self, groups: Sequence[Group], advice: str) -> None:
        """Raise ValueError if groups came or went since."""
        known = len(self.segments)
        if len(groups) != known:
            raise ValueError(
                f"param_groups must be the {known} groups that the schedule knows, got "
                f"{len(groups)}: {advice}"
            )

    def go_to(
        self,
        step: int,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        new_state: Callable[[Group, Tensor], dict[str, Any]] | None = None,
    ) -> None:
        """Freeze and thaw what is due at ``step``; ``state`` of what is frozen is released.

        ``new_state`` gives the state of a parameter that thaws, for optimizers that make theirs
        before the first step.
        """
        frozen = self.frozen_at(step)
        for g in sorted(frozen):
            self._freeze(g, groups[g]["params"], state)
        for g in sorted(set(self.frozen) - frozen):
            thawed = self.frozen.pop(g)
            for p in thawed:
                p.requires_grad_(True)
                if new_state is not None and p not in state:  # none was loaded since
                    state[p] = new_state(groups[g], p)
            note_thawed(thawed)

    def _freeze(self, g: int, params: Sequence[Tensor], state: MutableMapping[Tensor, Any]) -> None:
        if g not in self.frozen:
            earlier = set(map(id, frozen_by_schedule(params)))  # by the run that this one resumes
            self.frozen[g] = [p for p in params if p.requires_grad or id(p) in earlier]
            note_frozen(self.frozen[g])
        for p in params:  # each time: somebody may have switched it on, or loaded state for it
            p.requires_grad_(False)
            p.grad = None
            state.pop(p, None)


def tell_of_plan(groups: Sequence[Group], schedule: Schedule | None) -> None:
    """Warn if a plan gave the groups that was made for another schedule or learning rate.

    It warns, too, if layers start at many times the rate asked for, and raises as
    :func:`check_scheduled_groups` does.
    """
    if schedule is not None:
        _tell_of_scaled_rates(groups, schedule)
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
    rates = {_initial_lr_of(group) for group in groups}
    if lr is not None and len(rates) == 1 and not math.isclose(lr, *rates, rel_tol=1e-6):
        warn(
            f"split() was given lr={float(lr)}, and this optimizer starts from lr={rates.pop()}, "
            "which is what counts: the plan's table shows rates that no layer has. Pass both the "
            "same lr"
        )


def _initial_lr_of(group: Group) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _tell_of_scaled_rates(groups: Sequence[Group], schedule: Schedule) -> None:
    rows = check_scheduled_groups(schedule, groups)
    scales = [max((s.scale for s in row if not s.frozen), default=0.0) for row in rows]
    most = max(scales, default=0.0)
    if most > _MANY_TIMES:
        chosen = [g for g, scale in enumerate(scales) if scale > _MANY_TIMES]
        lr = _initial_lr_of(groups[scales.index(most)])
        warn(
            f"{layers_in_words(groups, chosen)} start at up to {most:.3g} times the learning rate "
            f"asked for, {most * lr:.3g} instead of {lr:.3g}: scale_lr=True gives layers that "
            "freeze early as much as the others. If training diverges, or starts from pretrained "
            "weights, pass scale_lr=False, or a larger t_0"
        )


def tell_of_earlier_run(groups: Sequence[Group], frozen_now: Iterable[int]) -> None:
    """Warn of layers that should train, but that the schedule of an earlier run has frozen."""
    trains = {g: groups[g]["params"] for g in set(range(len(groups))) - set(frozen_now)}
    frozen = set(map(id, frozen_by_schedule(p for params in trains.values() for p in params)))
    fixed = {g for g, params in trains.items() if not frozen.isdisjoint(map(id, params))}
    if fixed:
        warn(
            f"{layers_in_words(groups, fixed)} do not train: the schedule of an earlier run has "
            "frozen parameters of theirs. Call model.requires_grad_(True) before a new run"
        )


def layers_in_words(groups: Sequence[Group], chosen: Iterable[int]) -> str:
    """The layers of some groups, such as "layers 0..3"."""
    return f"layers {ranges(layers_of(groups, chosen))}"


def layers_of(groups: Sequence[Group], chosen: Iterable[int]) -> list[int]:
    """Indices of the layers of some groups, rising; a group that names none is one itself."""
    return sorted({groups[g].get("layer_index", g) for g in chosen})
