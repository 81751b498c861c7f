"""Loading a state into SGD: what is checked before torch loads it, and what torch leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastfreeze.layers.groups import as_step, check_scheduled_groups
from fastfreeze.ops._plans import buffer_dtype
from fastfreeze.optim._runtime import check_shape

if TYPE_CHECKING:
    from fastfreeze.optim.sgd import SGD

_SGDS_OWN = ("momentum", "dampening", "nesterov")  # in torch.optim.SGD's groups, and in no other's
_PLANS = (
    ". A plan has no groups for layers that were fixed at the split: call "
    "model.requires_grad_(True) before it"
)


class Loaded(NamedTuple):
    """A state that was found good, as far as torch does not load it.

    Attributes:
        groups: the optimizer's own before, for what the state's leave out;
        steps: of each of the state's groups, None where there is none;
        wide_momentum: buffers that torch would cast to their parameters' dtype;
        schedule: the configuration of the one it was saved under, if there was one.
    """

    groups: list[dict[str, Any]]
    steps: list[int | None]
    wide_momentum: dict[Tensor, Tensor]
    schedule: Any


def checked_state(optimizer: SGD, state_dict: Mapping[str, Any]) -> Loaded:
    """What torch will not load of a state; raises, before any change, if it does not fit."""
    optimizer._check_group_count()
    _check_state(state_dict, optimizer.param_groups)
    schedule, saved = optimizer.schedule, state_dict.get("schedule")
    if schedule is not None and saved is not None and saved != schedule.config():
        raise ValueError(
            f"the state was saved under schedule {saved}, this optimizer has "
            f"{schedule.config()}; make it with the same schedule, or delete "
            "state_dict['schedule'] to go on under the new one"
        )
    groups = state_dict["param_groups"]
    steps = [
        None
        if group.get("step") is None
        else as_step(f"state_dict: step of parameter group {g}", group["step"], schedule)
        for g, group in enumerate(groups)
    ]
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if schedule is not None:
        together = ({**mine, **theirs} for mine, theirs in zip(own, groups, strict=True))
        check_scheduled_groups(schedule, together)
    return Loaded(own, steps, _wide_momentum(optimizer, state_dict), saved)


def _wide_momentum(optimizer: SGD, state_dict: Mapping[str, Any]) -> dict[Tensor, Tensor]:
    """The buffers that torch will cast to their parameters' dtype, as they were."""
    if optimizer._momentum_dtype is None:
        return {}
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = {}
    for i, p in zip(saved, own, strict=True):
        buffer = state_dict["state"].get(i, {}).get("momentum_buffer")
        if isinstance(buffer, Tensor):
            dtype = buffer_dtype(p, optimizer._momentum_dtype)
            buffers[p] = buffer.to(p.device, dtype, copy=True)
    return buffers


def complete_load(optimizer: SGD, loaded: Loaded) -> None:
    """Add to what torch has loaded what it does not know; all of it has been checked."""
    for group, before in zip(optimizer.param_groups, loaded.groups, strict=True):
        group.pop("step", None)
        for key, value in before.items():  # torch's states know no layers
            group.setdefault(key, value)
        for p in group["params"]:
            _drop_empty_buffer(optimizer.state, p)
    for p, buffer in loaded.wide_momentum.items():
        optimizer.state[p]["momentum_buffer"] = buffer
    steps = set(loaded.steps)
    step = steps.pop() if len(steps) == 1 else None
    optimizer._go_to(optimizer._step if step is None else step)


def _check_state(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the state's groups and buffers fit the optimizer's groups."""
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
        missing = [name for name in _SGDS_OWN if name not in theirs]
        if missing:
            raise ValueError(
                f"state_dict must be SGD's: parameter group {g} has no {missing}, but "
                f"{sorted(set(theirs) - set(own))}, as another optimizer's state"
            )
        if len(theirs["params"]) != len(own["params"]):
            raise ValueError(
                f"loaded state dict: parameter group {g} doesn't match the size of optimizer's "
                f"group: {len(theirs['params'])} parameters, expected {len(own['params'])}"
            )
        for i, param in zip(theirs["params"], own["params"], strict=True):
            _check_param_state(g, state.get(i, {}), param)


def _check_param_state(g: int, state: Any, param: Tensor) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state_dict: a parameter's state in group {g} must be a dict, got {state!r}"
        )
    buffer = state.get("momentum_buffer")
    if buffer != {}:
        check_shape(f"state_dict: a momentum_buffer of parameter group {g}", buffer, param)


def _drop_empty_buffer(state: dict[Tensor, Any], param: Tensor) -> None:
    """Forget a momentum buffer of {}: torch.distributed.checkpoint's, flattened, for none."""
    if param in state and state[param].get("momentum_buffer") == {}:
        del state[param]["momentum_buffer"]
        if not state[param]:
            del state[param]
