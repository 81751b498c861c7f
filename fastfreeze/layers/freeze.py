"""A schedule's learning rates and freezing, for any optimizer of torch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastfreeze.errors import warn
from fastfreeze.layers.frozen import note_driven, note_frozen
from fastfreeze.layers.groups import (
    FollowedGroups,
    Group,
    as_step,
    check_scheduled_groups,
    layers_of,
    tell_of_earlier_run,
    tell_of_plan,
)
from fastfreeze.schedule import Schedule


class FreezeScheduler(LRScheduler):
    """Sets each group's learning rate, and freezes and thaws layers, as a schedule says.

    A scheduler like torch's, for every optimizer of torch and those derived from it: call ``step``
    after each of the optimizer's. It goes into PyTorch Lightning's ``configure_optimizers`` and
    into ``optimizers=(optimizer, scheduler)`` of transformers' ``Trainer``, too.

    A layer that freezes gets ``requires_grad=False``; its gradients and its optimizer state are
    released. The optimizer passes over it from then on. Should it thaw, its state starts anew.

    The schedule's steps are those that the optimizer has taken. A call of ``step`` without one in
    between changes nothing: where a GradScaler skips a step, the schedule waits, and calls from
    several processes, as accelerate makes them, count as one. Called once an epoch, it takes the
    schedule to where the optimizer is.

    Args:
        optimizer: its groups' ``lr``, or ``initial_lr`` where an earlier scheduler has left it, are
            the initial learning rates. A schedule that freezes needs groups with a ``layer_index``:
            ``fastfreeze.split(model).param_groups()``.
        schedule: learning rates and freezing as a function of the step.

    Attributes:
        schedule: as given.
        last_epoch: the step of the schedule, torch's name for it.

    Raises:
        TypeError: an argument, or a group's layer, of the wrong type; an optimizer whose ``state``
            is no dict, or that wraps another one, so that nothing of it can be released.
        ValueError: a rate out of its range, a schedule that freezes without layers, or an optimizer
            that has a schedule of its own.

    Warns:
        FastfreezeWarning: groups of a plan that was made for another schedule or learning rate;
            layers that start at over 10 times the rate; in ``step``, once, that somebody else
            changes the rates, and layers that an earlier run has frozen.

    Example:
        >>> import torch
        >>> plan = fastfreeze.split(model)
        >>> optimizer = torch.optim.AdamW(plan.param_groups(), lr=1e-3)
        >>> schedule = fastfreeze.FreezeOut(total_steps=10_000, t_0=0.5, scale_lr=False)
        >>> scheduler = fastfreeze.FreezeScheduler(optimizer, schedule)
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        _check_optimizer(optimizer)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a fastfreeze Schedule, got {schedule!r}")
        self.schedule = schedule
        self._layers = FollowedGroups(schedule, optimizer.param_groups)
        self._makes_state_early = _makes_state_early(optimizer)
        self._taken = 0  # the optimizer's steps
        self._told = False
        self._has_begun = False
        tell_of_plan(optimizer.param_groups, schedule)
        note_driven(optimizer)
        super().__init__(optimizer)  # which takes the first step
        self._listen()

    @property
    def current_step(self) -> int:
        """The step of the schedule that the groups are at."""
        return self.last_epoch

    @property
    def steps_taken(self) -> int:
        """How many steps the optimizer has taken; the groups follow it at the next ``step``."""
        return self._taken

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are frozen now, rising."""
        return tuple(layers_of(self.optimizer.param_groups, self._layers.frozen))

    def get_lr(self) -> list[float | Tensor]:
        """Each group's learning rate at the current step, a float."""
        return list(self._layers.lrs(self.last_epoch, self.base_lrs))

    def step(self, epoch: int | None = None) -> None:
        """Follow the optimizer to the step it is at.

        Args:
            epoch: go to that step instead.

        Raises:
            ValueError: the optimizer has taken more than the schedule's ``total_steps``, ``epoch``
                is out of the schedule, or groups came or went. Nothing has been changed then.
        """
        taken = self._taken if epoch is None else as_step("epoch", epoch, self.schedule)
        if taken > self.schedule.total_steps:
            raise ValueError(
                f"the optimizer has taken {taken} steps, and the schedule's total_steps is "
                f"{self.schedule.total_steps}. A step is a call of the optimizer's step(): "
                "total_steps must be epochs x batches per epoch / batches accumulated"
            )
        self._check_group_count()
        self._taken = taken
        if taken == self.last_epoch:
            return
        begins = self.last_epoch < 0
        if not begins:
            self._tell_of_another()
        self._step_count += 1
        self._go_to(taken)
        if not begins and not self._has_begun:  # a checkpoint may have been loaded until now
            self._has_begun = True
            tell_of_earlier_run(self.optimizer.param_groups, self._layers.frozen)

    def _update_lr(self, epoch: int | None = None) -> None:
        """What ``SequentialLR`` calls when this scheduler's turn comes."""
        self.step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The steps, initial rates and what is frozen, in plain numbers; and the schedule."""
        return {
            "last_epoch": self.last_epoch,
            "taken": self._taken,
            "switched_off": [[g, self._indices(g)] for g in sorted(self._layers.frozen)],
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "schedule": self.schedule.config(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of a state, and freeze what is frozen there.

        The optimizer's own state may be loaded before or after it.

        Raises:
            TypeError: the state is no dict, or a value in it of the wrong type.
            ValueError: it is another scheduler's, of another schedule, or of other groups. Nothing
                has been changed then.
        """
        if not isinstance(state_dict, Mapping) or "schedule" not in state_dict:
            raise TypeError(f"state_dict must be one of a FreezeScheduler, got {state_dict!r}")
        if state_dict["schedule"] != self.schedule.config():
            raise ValueError(
                f"state_dict must be of schedule {self.schedule.config()}, got one of "
                f"{state_dict['schedule']}"
            )
        self._check_group_count()
        step = state_dict.get("last_epoch")
        waits = step == -1  # its turn in a SequentialLR has not come
        step = as_step("last_epoch of state_dict", 0 if waits else step, self.schedule)
        taken = as_step("taken of state_dict", state_dict.get("taken", step), self.schedule)
        rates = state_dict.get("base_lrs")
        if not isinstance(rates, list) or len(rates) != len(self.base_lrs):
            raise ValueError(
                f"base_lrs of state_dict must be {len(self.base_lrs)} rates, got {rates!r}"
            )
        groups = self.optimizer.param_groups
        check_scheduled_groups(
            self.schedule,
            [{**group, "initial_lr": lr} for group, lr in zip(groups, rates, strict=True)],
        )
        self.base_lrs = list(rates)
        for group, lr in zip(groups, rates, strict=True):
            group["initial_lr"] = lr
        self._taken, self._step_count = taken, step + 1
        if waits:
            self.last_epoch = -1
            return
        for g, indices in state_dict.get("switched_off", []):
            note_frozen(p for i, p in enumerate(groups[g]["params"]) if i in indices)
        self._go_to(step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._listen()

    def _listen(self) -> None:
        """Count the optimizer's steps by hooks, which do not keep this scheduler alive.

        If a subclass's ``step`` calls its parent's, torch may call the hooks of both: of two ends
        in a row the first one counts.
        """
        mine, begun = weakref.ref(self), False

        def begin(*_: Any) -> None:
            nonlocal begun
            begun = True

        def count(optimizer: Optimizer, *_: Any) -> None:
            nonlocal begun
            scheduler = mine()
            found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler's, for fused ones
            if begun and scheduler is not None and not (found_inf is not None and found_inf.item()):
                scheduler._taken += 1
            begun = False

        self.optimizer.register_step_pre_hook(begin)
        self.optimizer.register_step_post_hook(count)

    def _go_to(self, step: int) -> None:
        """Be at a step that has been checked: rates first, then what is frozen."""
        self.last_epoch = step
        self._last_lr = self.get_lr()
        seen: set[int] = set()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # captured graphs and compiled steps read it
                if id(group["lr"]) in seen:  # torch gives all groups the same one
                    group["lr"] = group["lr"].clone()
                seen.add(id(group["lr"]))
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        new_state = partial(_new_state, self.optimizer) if self._makes_state_early else None
        self._layers.go_to(step, self.optimizer.param_groups, self.optimizer.state, new_state)

    def _indices(self, g: int) -> list[int]:
        """Which of a frozen group's parameters freezing has switched off."""
        switched_off = set(map(id, self._layers.frozen[g]))
        params = self.optimizer.param_groups[g]["params"]
        return [i for i, p in enumerate(params) if id(p) in switched_off]

    def _check_group_count(self) -> None:
        self._layers.check_count(self.optimizer.param_groups, "make a new scheduler for others")

    def _tell_of_another(self) -> None:
        """Warn, once, if the rates are not those that were set last."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for g, (lr, own) in enumerate(zip(rates, self._last_lr, strict=True)):
            if self._told or isinstance(lr, Tensor) or lr == own:
                continue
            self._told = True
            warn(
                f"lr of parameter group {g} is {lr!r}, and was set to {own!r}: another scheduler "
                "or a loaded state changes it. FreezeScheduler sets the schedule's rate again; to "
                "change one, change the schedule or the initial rate"
            )


def _makes_state_early(optimizer: Optimizer) -> bool:
    """Whether it makes the state of its parameters before their first step, as Adagrad does."""
    if not optimizer.state:
        return False
    group = optimizer.param_groups[0]
    try:
        return any(_new_state(optimizer, group, p) for p in group["params"][:1])
    except Exception:  # its class takes other arguments than its groups hold: it is none of torch's
        return False


def _new_state(optimizer: Optimizer, group: Group, param: Tensor) -> dict[str, Any]:
    """What a new optimizer of this class keeps of a parameter of the group."""
    names = inspect.signature(type(optimizer)).parameters.keys() & group.keys() - {"params"}
    new = type(optimizer)([param], **{name: group[name] for name in names})
    state: dict[str, Any] = new.state.get(param, {})
    return state


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if any(isinstance(held, Optimizer) for held in vars(optimizer).values()):
        raise TypeError(
            f"optimizer must hold its state itself, got {type(optimizer).__name__} around another "
            "optimizer: make the scheduler for that one, before it is wrapped"
        )
    if not isinstance(optimizer.state, MutableMapping):
        raise TypeError(
            f"optimizer.state must be a dict, whose entries a freeze can release, got "
            f"{type(optimizer.state).__name__}"
        )
    own = getattr(optimizer, "schedule", None)
    if own is not None:
        raise ValueError(
            f"optimizer must be without a schedule of its own, got {type(optimizer).__name__} with "
            f"{own!r}: it freezes by itself, and needs no FreezeScheduler"
        )
