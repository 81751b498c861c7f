"""What the optimizers share: all groups stepped at once, a schedule, freezing, checkpoints."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from fastfreeze.kernels.library import Backend, is_capturing, require
from fastfreeze.kernels.plans import dtype_of_state
from fastfreeze.layers.groups import (
    FollowedGroups,
    as_step,
    check_group_rate,
    layers_of,
    tell_of_plan,
)
from fastfreeze.optim._checks import schedule_of
from fastfreeze.optim._hooks import hooked_if_awaited
from fastfreeze.optim._loading import Loaded, checked_state, restore, tell_of_loaded
from fastfreeze.optim._notices import Notices
from fastfreeze.optim._rule import UpdateRule
from fastfreeze.optim._runtime import Runtime, Task, cuda_devices
from fastfreeze.optim._signals import SignalsDeferred
from fastfreeze.schedule import Schedule

_lr_of = itemgetter("lr")
_initial_lr_of = itemgetter("initial_lr")
_UNCHECKED = object()  # is no group's initial_lr
# Attributes besides torch's that a copy or a pickle keeps; plans are made anew.
_PICKLED = (
    "_schedule",
    "_backend",
    "_state_dtype",
    "_step",
    "_followed",
    "_shown",
    "_step_supports_amp_scaling",
)


_LOCKED: weakref.WeakSet[FusedOptimizer] = weakref.WeakSet()


def _unlock_all() -> None:
    """In a forked child, which has none of the threads that may have held a lock."""
    for optimizer in _LOCKED:
        optimizer._lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock_all)


def _complete_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Add to a state what torch does not know: the step, and the schedule beside the groups."""
    assert isinstance(optimizer, FusedOptimizer)
    for group in state["param_groups"]:
        group["step"] = optimizer._step
    if optimizer._schedule is not None:
        state["schedule"] = optimizer._schedule.config()


class FusedOptimizer(Optimizer):
    """An optimizer whose step is one call for all groups, and which knows its schedule.

    What is a class's own is its rule; everything else is here.

    Args:
        params: parameters, or parameter groups as dicts.
        defaults: of the groups, with torch's ``foreach``, ``fused`` and ``differentiable``.
        schedule, total_steps: learning rates and freezing; ``total_steps`` alone means Cosine.
        state_dtype: of the state of 16-bit parameters; None for the parameters'.
        backend: the one asked for.
    """

    _rule: ClassVar[UpdateRule]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        schedule: Schedule | None,
        total_steps: int | None,
        state_dtype: torch.dtype | None,
        backend: Backend | None,
    ) -> None:
        if defaults["differentiable"]:
            raise ValueError(
                "differentiable=True is not supported: the update is not recorded by autograd; "
                f"use torch.optim.{self._rule.name} for it"
            )
        if defaults["foreach"] and defaults["fused"]:
            raise RuntimeError("foreach and fused cannot both be True")
        if backend is not None:
            require(backend)
        if hasattr(params, "param_groups"):
            raise TypeError(
                f"params must be parameters or groups, got {params!r}: pass its groups, "
                "as plan.param_groups() gives them"
            )
        self._schedule = schedule_of(schedule, total_steps)
        self._backend = backend
        self._state_dtype = state_dtype
        self._step = 0
        self._followed: FollowedGroups | None = None  # with a schedule, once there are groups
        self._shown: list[float] = []  # each group's lr, as last set by the schedule
        self._initial_lrs: list[Any] = []  # each group's, as last checked
        self._runtime: Runtime | None = None
        self._captured: list[Runtime] = []  # graphs read their tables
        self._lock = threading.RLock()
        _LOCKED.add(self)
        self._notices = Notices({}, 0)
        super().__init__(params, defaults)
        tell_of_plan(self.param_groups, self._schedule)
        if self._schedule is not None:
            self._apply_schedule(0)
        # A GradScaler then leaves the division by its scale, and the skipping, to step().
        self._step_supports_amp_scaling = True

    @property
    def schedule(self) -> Schedule | None:
        """The schedule; None if the groups' ``lr`` is left to the user."""
        return self._schedule

    @property
    def current_step(self) -> int:
        """How many steps were taken; set it to go to another point of the schedule.

        A graph's replays count: once a step is captured, reading it waits for the device.

        Raises:
            TypeError: set to what is no integer.
            ValueError: set to a step outside the schedule's ``0..total_steps``.
        """
        if self._captured:
            with self._lock:
                self._follow_replays()
        return self._step

    @current_step.setter
    def current_step(self, step: int) -> None:
        with self._lock:
            self._go_to(as_step("current_step", step, self._schedule))

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are frozen now, rising."""
        self._check_group_count()
        return tuple(layers_of(self.param_groups, self._frozen))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # pointers cannot be traced: a compiled step breaks its graph here
    @hooked_if_awaited
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient and is not frozen.

        The step counter advances at every call, also when a GradScaler has found an overflow and
        nothing is updated: the schedule then goes on as it does for torch's schedulers.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: the schedule's ``total_steps`` have been taken, somebody else has changed a
                scheduled group's ``lr``, an ``initial_lr`` is out of its range, groups came or went
                without ``add_param_group``, a gradient or a tensor of the state has not its
                parameter's shape, or a count of steps in it is below 0. Nothing has been changed
                then.
            TypeError: an ``initial_lr``, or a count of steps in the state, is no number. Nothing
                has been changed then.
        """
        loss = None
        if closure is not None:
            with self._lock, torch.no_grad():
                if not self._is_ready(self._is_capturing()):
                    return None
            with torch.enable_grad():
                loss = closure()
        had_grad = torch.is_grad_enabled()
        with self._lock:
            try:
                torch._C._set_grad_enabled(False)  # torch.no_grad() takes eight times as long
                capturing = self._is_capturing()
                if self._is_ready(capturing):
                    if capturing:
                        self._capture()
                    else:
                        self._take_step()
            finally:
                torch._C._set_grad_enabled(had_grad)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; a schedule counts it from the current step on."""
        with self._lock:
            added_later = bool(self._shown)  # not while the first groups are being made
            if added_later:
                self._check_group_count()
            super().add_param_group(param_group)
            if added_later:
                try:
                    self._apply_schedule(self._step)
                except (TypeError, ValueError):
                    self.param_groups.pop()
                    raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's, which can load it; the step is in each group, the schedule beside them."""
        with self._lock:
            self._follow_replays()
            self._check_group_count()
            self._settle()
            # The first hook, so that the users' find the state whole.
            hook = self.register_state_dict_post_hook(_complete_state, prepend=True)
            try:
                state: dict[str, Any] = super().state_dict()
            finally:
                hook.remove()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's of this name, and freeze what was frozen.

        A state of this class that torch's has loaded, trained on and saved again still has the step
        at which it left, since torch keeps the number and does not advance it: set ``current_step``
        after loading it under a schedule.

        Raises:
            TypeError: the state is not a dict, or a value in it of the wrong type.
            ValueError: the state is another optimizer's, the groups do not match, a tensor of a
                parameter's state is none of its shape, a step, learning rate or layer is not one
                that the schedule knows, or the state belongs to another schedule. Nothing has been
                changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict must be a dict, as state_dict() of fastfreeze.{self._rule.name} or "
                f"torch.optim.{self._rule.name} gives it, got {state_dict!r}"
            )
        found: list[Loaded] = []

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            self._check_group_count()
            groups, schedule = self.param_groups, self._schedule
            found.append(checked_state(self._rule, state, groups, schedule, self._state_dtype))

        def complete(_: Optimizer) -> None:
            restore(self._rule, found[-1], self.param_groups, self.state)
            self._go_to(self._step if found[-1].step is None else found[-1].step)

        with self._lock:
            # The last hook before loading checks what the user's hooks have made of the state; the
            # first one after it completes it, so that theirs find it whole.
            hooks = [
                self.register_load_state_dict_pre_hook(check),
                self.register_load_state_dict_post_hook(complete, prepend=True),
            ]
            try:
                super().load_state_dict(state_dict)
            finally:
                for hook in hooks:
                    hook.remove()
        tell_of_loaded(found[-1], self._rule, self._schedule, self._step)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._follow_replays()
            self._settle()
            state: dict[str, Any] = super().__getstate__()
            return {**state, **{name: getattr(self, name) for name in _PICKLED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runtime = None
        self._captured = []
        if "_lock" not in self.__dict__:  # not in a load, which holds it
            self._lock = threading.RLock()
            _LOCKED.add(self)
        self._notices = Notices(self._frozen, self._step)
        self._initial_lrs = []
        for group in self.param_groups:
            for name, value in self.defaults.items():  # older versions of torch have fewer
                group.setdefault(name, value)

    @property
    def _frozen(self) -> dict[int, list[Tensor]]:
        """By group, the parameters that the schedule has switched off."""
        return {} if self._followed is None else self._followed.frozen

    def _is_ready(self, capturing: bool) -> bool:
        """Whether to take a step: not where there was state to make. Raises if groups forbid it."""
        if self._captured and not capturing:
            self._follow_replays()
        groups, schedule = self.param_groups, self._schedule
        if schedule is None:
            return True
        known = len(groups) == len(self._shown) and list(map(_lr_of, groups)) == self._shown
        if known and self._step < schedule.total_steps:
            self._check_initial_lrs(schedule)
            return True
        self._check_group_count()
        if not self._is_to_make_state(schedule):
            raise self._off_schedule(schedule)
        self._make_state()
        return False

    def _is_to_make_state(self, schedule: Schedule) -> bool:
        """Whether this is no step: torch.distributed.checkpoint wants an optimizer to have state.

        It then calls ``step`` with every learning rate and gradient set to 0.
        """
        if any(map(_lr_of, self.param_groups)):
            return False
        if self._step < schedule.total_steps and not any(self._shown):
            return False  # the schedule is at 0
        params = (p for group in self.param_groups for p in group["params"])
        grads = [p.grad for p in params if p.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

    def _make_state(self) -> None:
        """State of 0 for each parameter that has a gradient and none yet."""
        for group in self.param_groups:
            names = self._rule.kept(group)
            for p in group["params"]:
                if not names or p.grad is None or p in self.state:
                    continue
                if self._rule.counter is not None:
                    self.state[p][self._rule.counter] = torch.tensor(0.0)
                for name in names:
                    dtype = dtype_of_state(p, self._state_dtype)
                    self.state[p][name] = torch.zeros_like(p, dtype=dtype)
        self._runtime = None

    def _take_step(self) -> None:
        runtime = self._runtime
        if runtime is None or not runtime.serves(self.param_groups, self.state):
            runtime = self._planned()
        self._notices.look(self, self._step, runtime.groups_with_gradients)
        with SignalsDeferred():
            lrs = runtime.step(self.param_groups, self._step, *_scaler_of(self))
            self._step += 1
            if self._followed is not None:
                self._show(self._scheduled_lrs(self._followed) if lrs is None else lrs)
                if self._step in self._followed.changes:
                    self._follow(self._followed)

    def _planned(self) -> Runtime:
        """New plans, with this step's gradients."""
        self._settle()
        followed, schedule = self._followed, self._schedule
        task = Task(
            rule=self._rule,
            groups=self.param_groups,
            state=self.state,
            left_out=frozenset(self._frozen),
            segments=[()] * len(self.param_groups) if followed is None else followed.segments,
            eta_min=0.0 if schedule is None else schedule.eta_min,
            warmup_steps=0 if schedule is None else schedule.warmup_steps,
            state_dtype=self._state_dtype,
            backend=self._backend,
        )
        runtime = self._runtime = Runtime(task)
        if not runtime.serves(self.param_groups, self.state):
            raise RuntimeError("parameters or gradients change while they are being read")
        return runtime

    def _is_capturing(self) -> bool:
        if self._runtime is None:
            devices = cuda_devices(p for group in self.param_groups for p in group["params"])
        else:
            devices = self._runtime.cuda_devices
        return any(map(is_capturing, devices))

    def _capture(self) -> None:
        runtime = self._runtime
        if runtime is None or not runtime.serves(self.param_groups, self.state):
            raise RuntimeError(
                "parameter groups, gradients or layers have changed since the last step: take a "
                "step before capturing one"
            )
        runtime.capture(self.param_groups, *_scaler_of(self))
        if runtime not in self._captured:
            self._captured.append(runtime)

    def _follow_replays(self) -> None:
        """Catch up with the steps that replays of a captured one have taken."""
        runtime = self._runtime
        if runtime is None or runtime not in self._captured:
            return
        before, step = self._step, runtime.position()
        if step == before:
            return
        self._go_to(step)
        if self._followed is not None:
            self._runtime = runtime  # the graph goes on with its tables, freezing by itself
            self._check_thawed(self._followed, runtime.left_out, range(before + 1, step))

    def _check_thawed(
        self, followed: FollowedGroups, left_out: frozenset[int], steps: range
    ) -> None:
        """Refuse to go on if a graph that knows nothing of a layer was replayed past its thaw."""
        for step in sorted(followed.changes.intersection(steps)):
            thawed = left_out - followed.frozen_at(step)
            if thawed:
                layers = layers_of(self.param_groups, thawed)
                raise RuntimeError(
                    f"layers {layers}, which were frozen when the step was captured, have thawed "
                    f"at step {step}, and the graph has not trained them since: capture anew at "
                    "every thaw"
                )

    def _settle(self) -> None:
        """Give up state that an overflow has left without its first step."""
        if self._runtime is not None and self._runtime.settle():
            self._runtime = None

    def _go_to(self, step: int) -> None:
        """Be at a step, which has been checked, with the groups where the schedule is then."""
        if self._schedule is not None:
            self._check_group_count()
            self._apply_schedule(step)
        else:
            self._step = step

    def _follow(self, followed: FollowedGroups) -> None:
        """Freeze or thaw what is due at the step."""
        had_gradients = set() if self._runtime is None else self._runtime.groups_with_gradients()
        self._settle()
        followed.go_to(self._step, self.param_groups, self.state)
        self._runtime = None
        self._notices.freeze(followed.frozen, self._step, had_gradients)

    def _show(self, lrs: list[float]) -> None:
        """Put learning rates and the step into the groups, where users and checkpoints look."""
        self._shown, step = lrs, self._step
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"], group["step"] = lr, step

    def _apply_schedule(self, step: int) -> None:
        """Bring all groups to where the schedule is at a step; checks come first."""
        assert self._schedule is not None
        self._followed = FollowedGroups(self._schedule, self.param_groups, self._frozen)
        for group in self.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._settle()
        self._followed.go_to(step, self.param_groups, self.state)
        self._runtime = None
        self._step = step
        self._show(self._scheduled_lrs(self._followed))
        self._notices = Notices(self._frozen, step)

    def _scheduled_lrs(self, followed: FollowedGroups) -> list[float]:
        return followed.lrs(self._step, list(map(_initial_lr_of, self.param_groups)))

    def _check_initial_lrs(self, schedule: Schedule) -> None:
        """Raise unless each group's ``initial_lr``, which the user may change, is a rate."""
        rates = [group.get("initial_lr") for group in self.param_groups]
        if len(rates) == len(self._initial_lrs) and all(map(is_, rates, self._initial_lrs)):
            return
        for g, rate in enumerate(rates):
            check_group_rate(schedule, g, "initial_lr", rate)
        # A tensor can change and be the same object: it is checked at every step.
        known = [rate if isinstance(rate, (int, float)) else _UNCHECKED for rate in rates]
        self._initial_lrs = known

    def _check_group_count(self) -> None:
        """Raise ValueError if groups were put into ``param_groups`` or taken out by hand."""
        if self._followed is not None:
            self._followed.check_count(
                self.param_groups,
                "add groups with add_param_group, and make a new optimizer to be without some",
            )

    def _off_schedule(self, schedule: Schedule) -> ValueError:
        """What keeps a step from being taken: all have been, or a rate is not as it was set."""
        if self._step >= schedule.total_steps:
            return ValueError(
                f"step() was called after the schedule's total_steps={schedule.total_steps} "
                "steps. A step is a call of step(), one for each batch: total_steps must be epochs "
                "x batches per epoch, as len(loader) counts them"
            )
        g = next(g for g, lr in enumerate(self._shown) if self.param_groups[g]["lr"] != lr)
        return ValueError(
            f"lr of parameter group {g} must be {self._shown[g]!r} as the schedule says, got "
            f"{self.param_groups[g]['lr']!r}. If a torch.optim.lr_scheduler sets it, leave "
            "out that scheduler's step(): the schedule sets the rates. To change one by hand, "
            "change group['initial_lr'], or make the optimizer without a schedule"
        )


def _scaler_of(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler has left: its scale, and whether it has found an overflow."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):  # 0 where there was no gradient to look at
        found_inf = None
    return getattr(optimizer, "grad_scale", None), found_inf
