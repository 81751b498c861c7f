"""Loading a state: what is checked before torch loads it, and what torch leaves out."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfreeze.errors import warn
from fastfreeze.kernels.plans import dtype_of_state
from fastfreeze.layers.groups import as_step, check_scheduled_groups
from fastfreeze.optim._rule import UpdateRule
from fastfreeze.optim._runtime import Groups, State, check_shape, counts_of
from fastfreeze.schedule import Schedule

_PLANS = (
    ". A plan has no groups for layers that were fixed at the split: call "
    "model.requires_grad_(True) before it"
)


class Loaded(NamedTuple):
    """What torch does not load of a state that has been checked.

    Attributes:
        groups: the optimizer's own values, for keys that the state's groups lack;
        steps: of the state's groups, each once, None where there is none;
        wide: by parameter and name, moments that torch would cast to their parameters' dtype;
        schedule: the configuration of the one it was saved under, if there was one.
    """

    groups: list[dict[str, Any]]
    steps: list[int | None]
    wide: dict[Tensor, dict[str, Tensor]]
    schedule: Any

    @property
    def step(self) -> int | None:
        """The step it was saved at; None if it does not say one."""
        return self.steps[0] if len(self.steps) == 1 else None


def checked_state(
    rule: UpdateRule,
    state_dict: Mapping[str, Any],
    own: Groups,
    schedule: Schedule | None,
    state_dtype: torch.dtype | None,
) -> Loaded:
    """What torch will not load of a state for groups ``own``; raises if it does not fit them."""
    _check_state(rule, state_dict, own)
    state, groups = state_dict["state"], state_dict["param_groups"]
    counts_of(rule, [state.get(i, {}) for group in groups for i in group["params"]])
    saved = state_dict.get("schedule")
    if schedule is not None and saved is not None and saved != schedule.config():
        raise ValueError(
            f"the state was saved under schedule {saved}, this optimizer has "
            f"{schedule.config()}; make it with the same schedule, or delete "
            "state_dict['schedule'] to go on under the new one"
        )
    steps = [
        None
        if group.get("step") is None
        else as_step(f"state_dict: step of parameter group {g}", group["step"], schedule)
        for g, group in enumerate(groups)
    ]
    before = [{k: v for k, v in group.items() if k != "params"} for group in own]
    if schedule is not None:
        together = ({**mine, **theirs} for mine, theirs in zip(before, groups, strict=True))
        check_scheduled_groups(schedule, together)
    wide = {} if state_dtype is None else _wide(rule, state_dict, own, state_dtype)
    return Loaded(before, list(dict.fromkeys(steps)), wide, saved)


def _wide(
    rule: UpdateRule, state_dict: Mapping[str, Any], own: Groups, state_dtype: torch.dtype
) -> dict[Tensor, dict[str, Tensor]]:
    """The moments that torch will cast to their parameters' dtype, as they were."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in own for p in group["params"]]
    wide: dict[Tensor, dict[str, Tensor]] = {}
    for i, p in zip(saved, params, strict=True):
        state = state_dict["state"].get(i, {})
        moments = {n: state[n] for n in rule.moments if isinstance(state.get(n), Tensor)}
        dtype = dtype_of_state(p, state_dtype)
        wide[p] = {n: moment.to(p.device, dtype, copy=True) for n, moment in moments.items()}
    return wide


def restore(rule: UpdateRule, loaded: Loaded, groups: Groups, state: State) -> None:
    """Add to what torch has loaded into ``groups`` and ``state`` what it does not know."""
    for group, before in zip(groups, loaded.groups, strict=True):
        group.pop("step", None)
        for key, value in before.items():  # torch's states know no layers
            group.setdefault(key, value)
        for p in group["params"]:
            _drop_empty(rule, state, p)
            if rule.counter in state.get(p, {}):  # a number, if an older torch has saved it
                state[p][rule.counter] = torch.as_tensor(state[p][rule.counter]).float()
    for p, moments in loaded.wide.items():
        if moments:
            state[p].update(moments)


def tell_of_loaded(loaded: Loaded, rule: UpdateRule, schedule: Schedule | None, step: int) -> None:
    """Warn if a state and the optimizer that has loaded it differ in their schedule."""
    if schedule is None and loaded.schedule is not None:
        warn(
            f"the loaded state was saved under schedule {loaded.schedule}, and this "
            "optimizer has none: its learning rates stay where that had them, layers at 0 "
            "among them. Make it with the schedule, or set each group's lr"
        )
    if schedule is not None and loaded.step is None:
        what = (
            f"has no step counter (torch.optim.{rule.name} keeps none)"
            if loaded.steps in ([], [None])
            else f"has groups with different steps, {loaded.steps}"
        )
        warn(
            f"the loaded state {what}: the schedule goes on from step {step}; set "
            "optimizer.current_step"
        )


def _check_state(rule: UpdateRule, state_dict: Mapping[str, Any], groups: Groups) -> None:
    """Raise ValueError unless the state's groups and moments fit the optimizer's groups."""
    state, saved = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(saved, (list, tuple)):
        raise ValueError(
            "state_dict must have a dict 'state' and a list 'param_groups', as state_dict() gives "
            f"them, got keys {list(state_dict)} with {type(state).__name__} and "
            f"{type(saved).__name__}"
        )
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, "
            f"expected this optimizer's {len(groups)}{_PLANS if 'layer_index' in groups[0] else ''}"
        )
    for g, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        if not isinstance(theirs, Mapping) or "params" not in theirs:
            raise ValueError(
                f"state_dict: parameter group {g} must be a dict with 'params', got {theirs!r}"
            )
        missing = [name for name in rule.required if name not in theirs]
        if missing:
            raise ValueError(
                f"state_dict must be {rule.name}'s: parameter group {g} has no {missing}, but "
                f"{sorted(set(theirs) - set(own))}, as another optimizer's state"
            )
        if len(theirs["params"]) != len(own["params"]):
            raise ValueError(
                f"loaded state dict: parameter group {g} doesn't match the size of optimizer's "
                f"group: {len(theirs['params'])} parameters, expected {len(own['params'])}"
            )
        for i, param in zip(theirs["params"], own["params"], strict=True):
            _check_param_state(rule, g, state.get(i, {}), param)


def _check_param_state(rule: UpdateRule, g: int, state: Any, param: Tensor) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state_dict: a parameter's state in group {g} must be a dict, got {state!r}"
        )
    for name in rule.moments:
        if state.get(name) != {}:
            check_shape(f"state_dict: a {name} of parameter group {g}", state.get(name), param)


def _drop_empty(rule: UpdateRule, state: MutableMapping[Tensor, Any], param: Tensor) -> None:
    """Forget moments of {}: torch.distributed.checkpoint's, flattened, for none."""
    if param not in state:
        return
    for name in (rule.counter, *rule.moments):
        if state[param].get(name) == {}:
            del state[param][name]
    if not state[param]:
        del state[param]
