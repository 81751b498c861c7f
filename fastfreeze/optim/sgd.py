"""SGD: a drop-in for ``torch.optim.SGD`` that steps all groups at once and knows its schedule."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from fastfreeze._frozen import frozen_by_schedule, note_frozen, note_thawed
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.groups import (
    SegmentTable,
    as_step,
    check_group_rate,
    check_scheduled_groups,
    layers_of,
    tell_of_plan,
)
from fastfreeze.ops._library import Backend, is_capturing, require
from fastfreeze.ops._plans import buffer_dtype
from fastfreeze.optim._checks import check_hypers, schedule_of
from fastfreeze.optim._loading import Loaded, checked_state, complete_load
from fastfreeze.optim._notices import Notices
from fastfreeze.optim._runtime import Runtime, cuda_devices
from fastfreeze.optim._signals import SignalsDeferred
from fastfreeze.schedule import Schedule, Segment

_lr_of = itemgetter("lr")
_initial_lr_of = itemgetter("initial_lr")
_UNCHECKED = object()  # is no group's initial_lr
# Attributes besides torch's that a copy or a pickle keeps; plans are made anew.
_PICKLED = (
    "_schedule",
    "_backend",
    "_momentum_dtype",
    "_step",
    "_frozen",
    "_segments",
    "_events",
    "_shown",
    "_step_supports_amp_scaling",
)


_LOCKED: weakref.WeakSet[SGD] = weakref.WeakSet()


def _unlock_all() -> None:
    """In a forked child, which has none of the threads that may have held a lock."""
    for optimizer in _LOCKED:
        optimizer._lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock_all)


def _complete_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Add to a state what torch does not know: the step, and the schedule beside the groups."""
    assert isinstance(optimizer, SGD)
    for group in state["param_groups"]:
        group["step"] = optimizer._step
    if optimizer._schedule is not None:
        state["schedule"] = optimizer._schedule.config()


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, one kernel for all parameter groups.

    Takes ``torch.optim.SGD``'s arguments and computes what its for-loop computes. With a schedule
    it also sets each group's learning rate at every step, and freezes and thaws layers: a frozen
    layer's parameters have ``requires_grad=False``, no gradient and no momentum, and are not
    touched until they thaw.

    Args:
        params: parameters, or parameter groups as dicts. A schedule that freezes needs groups with
            a ``layer_index``: ``fastfreeze.split(model).param_groups()``.
        lr: learning rate, >= 0; with a schedule each group's initial one.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, fused: accepted so that the call need not change; there is one implementation here,
            and it is fused.
        differentiable: not supported; True is refused.
        schedule: learning rates and freezing as a function of the step.
        total_steps: steps in the run; alone it means ``schedule=Cosine(total_steps)``.
        momentum_dtype: torch.float32 keeps the momentum of float16 and bfloat16 parameters in
            float32; None, as in torch, in the parameters' dtype.
        backend: what runs the step: "cuda", "triton", "cpu", "reference", or None for the fastest
            that can take each parameter. A backend given by name never gives way to another.

    A step on a CUDA device may be captured in a graph (``torch.cuda.graph``), after at least one
    step outside it with the same gradients present. Each replay then takes the next step: the
    schedule, a GradScaler's overflow and frozen layers are followed on the device, and
    ``current_step`` waits for the device. Freezing in a graph leaves the weights as they are, but
    the captured backward stays as long as it was: capture anew after a freeze, which a thaw makes
    a must, and do not replay an old graph after other steps. Without a schedule a graph keeps the
    learning rates it was captured with.

    Several threads may step one optimizer, and read its state: one after the other. Handlers of
    signals, and so Ctrl-C, wait for the end of a step: weights, momentum, rates and the step change
    together.

    Raises:
        TypeError: an argument, or a group's layer, of the wrong type.
        ValueError: a value out of its range, a schedule that freezes without layers, or parameters
            that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.

    Warns:
        FastfreezeWarning: groups of a plan that was made for another schedule or learning rate;
            layers that an earlier run has frozen; in a step, frozen layers that require gradients
            again, and layers that get none since others froze.

    Example:
        >>> optimizer = fastfreeze.SGD(model.parameters(), lr=0.1, momentum=0.9, total_steps=10_000)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        momentum_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        check_hypers(lr, momentum, weight_decay, nesterov, dampening)
        if momentum_dtype not in (None, torch.float32):
            raise ValueError(f"momentum_dtype must be None or torch.float32, got {momentum_dtype}")
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the update is not recorded by autograd; "
                "use torch.optim.SGD for it"
            )
        if foreach and fused:
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
        self._momentum_dtype = momentum_dtype
        self._step = 0
        self._frozen: dict[
            int, list[Tensor]
        ] = {}  # group: the parameters that freezing switched off
        self._segments: list[tuple[Segment, ...]] = []  # of each group
        self._events: dict[int, list[tuple[int, bool]]] = {}  # step: groups, frozen from it or not
        self._shown: list[float] = []  # each group's lr, as last set by the schedule
        self._initial_lrs: list[Any] = []  # each group's, as last checked
        self._runtime: Runtime | None = None
        self._captured: list[Runtime] = []  # graphs read their tables
        self._lock = threading.RLock()
        _LOCKED.add(self)
        self._notices = Notices()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
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
    @torch.no_grad()
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
                without ``add_param_group``, or a gradient or momentum buffer has another shape than
                its parameter. Nothing has been changed then.
            TypeError: an ``initial_lr`` is no number. Nothing has been changed then.
        """
        with self._lock:
            capturing = self._is_capturing()
            if not capturing:
                self._follow_replays()
            self._check_group_count()
            if self._is_to_make_state():
                self._make_state()
                return None
            if capturing or closure is not None:
                self._check_schedule()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            if capturing:
                self._capture()
            else:
                self._take_step()
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
        """Load a state of this class or of ``torch.optim.SGD``, and freeze what was frozen.

        A state of this class that ``torch.optim.SGD`` has loaded, trained on and saved again still
        has the step at which it left, since torch keeps the number and does not advance it: set
        ``current_step`` after loading it under a schedule.

        Raises:
            TypeError: the state is not a dict, or a value in it of the wrong type.
            ValueError: the state is another optimizer's, the groups do not match, a momentum buffer
                is no tensor of its parameter's shape, a step, learning rate or layer is not one
                that the schedule knows, or the state belongs to another schedule. Nothing has been
                changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                "state_dict must be a dict, as state_dict() of fastfreeze.SGD or torch.optim.SGD "
                f"gives it, got {state_dict!r}"
            )
        found: list[Loaded] = []
        with self._lock:
            # The last hook before loading checks what the user's hooks have made of the state; the
            # first one after it completes it, so that theirs find it whole.
            hooks = [
                self.register_load_state_dict_pre_hook(
                    lambda _, state: found.append(checked_state(self, state))
                ),
                self.register_load_state_dict_post_hook(
                    lambda _: complete_load(self, found[-1]), prepend=True
                ),
            ]
            try:
                super().load_state_dict(state_dict)
            finally:
                for hook in hooks:
                    hook.remove()
        if self._schedule is None and found[-1].schedule is not None:
            warnings.warn(
                f"the loaded state was saved under schedule {found[-1].schedule}, and this "
                "optimizer has none: its learning rates stay where that had them, layers at 0 "
                "among them. Make it with the schedule, or set each group's lr",
                FastfreezeWarning,
                stacklevel=2,
            )
        steps = list(dict.fromkeys(found[-1].steps))
        if self._schedule is not None and (len(steps) != 1 or steps[0] is None):
            what = (
                "has no step counter (torch.optim.SGD keeps none)"
                if steps in ([], [None])
                else f"has groups with different steps, {steps}"
            )
            warnings.warn(
                f"the loaded state {what}: the schedule goes on from step {self._step}; set "
                "optimizer.current_step",
                FastfreezeWarning,
                stacklevel=2,
            )

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
        self._notices = Notices()
        self._notices.freeze(self, set())
        self._initial_lrs = [_UNCHECKED] * len(self.param_groups)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)

    def _is_to_make_state(self) -> bool:
        """Whether this is no step: torch.distributed.checkpoint wants an optimizer to have state.

        It then calls ``step`` with every learning rate and gradient set to 0.
        """
        if self._schedule is None or any(map(_lr_of, self.param_groups)):
            return False
        if self._step < self._schedule.total_steps and not any(self._shown):
            return False  # the schedule is at 0
        params = (p for group in self.param_groups for p in group["params"])
        grads = [p.grad for p in params if p.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

    def _make_state(self) -> None:
        """Momentum of 0 for each parameter that has a gradient and none yet."""
        for group in self.param_groups:
            for p in group["params"]:
                if group["momentum"] != 0 and p.grad is not None and p not in self.state:
                    dtype = buffer_dtype(p, self._momentum_dtype)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        self._runtime = None

    def _take_step(self) -> None:
        self._check_schedule()
        runtime = self._collected()
        self._notices.look(self, runtime.groups_with_gradients)
        with SignalsDeferred():
            lrs = runtime.step(self)
            self._step += 1
            if self._schedule is not None:
                self._advance(lrs)

    def _collected(self) -> Runtime:
        """Plans that fit, with this step's gradients."""
        runtime = self._runtime
        if runtime is None or not (runtime.fits(self) and runtime.collect(self)):
            self._settle()
            runtime = self._runtime = Runtime(self)
            if not runtime.collect(self):
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
        if runtime is None or not (runtime.fits(self) and runtime.collect(self)):
            raise RuntimeError(
                "parameter groups, gradients or layers have changed since the last step: take a "
                "step before capturing one"
            )
        runtime.capture(self)
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
        if self._schedule is not None:
            self._runtime = runtime  # the graph goes on with its tables, freezing by itself
            self._check_thawed(runtime.left_out, range(before + 1, step))

    def _check_thawed(self, left_out: frozenset[int], steps: range) -> None:
        """Refuse to go on if a graph that knows nothing of a layer was replayed past its thaw."""
        for step in steps:
            thawed = {g for g, freezes in self._events.get(step, ()) if not freezes} & left_out
            if thawed:
                layers = layers_of(self.param_groups, thawed)
                raise RuntimeError(
                    f"layers {layers}, which were frozen when the step was captured, have thawed "
                    f"at step {step}, and the graph has not trained them since: capture anew at "
                    "every thaw"
                )

    def _settle(self) -> None:
        """Give up momentum buffers that an overflow has left without their first step."""
        if self._runtime is not None and self._runtime.settle():
            self._runtime = None

    def _go_to(self, step: int) -> None:
        """Be at a step, which has been checked, with the groups where the schedule is then."""
        if self._schedule is not None:
            self._check_group_count()
            self._apply_schedule(step)
        else:
            self._step = step

    def _advance(self, lrs: list[float]) -> None:
        """Show the next step's learning rates, and freeze or thaw what is due at it."""
        self._show(lrs)
        events = self._events.get(self._step, ())
        if not events:
            return
        had_gradients = set() if self._runtime is None else self._runtime.groups_with_gradients()
        for g, frozen in events:
            if frozen:
                self._freeze(g)
            else:
                self._thaw(g)
        self._notices.freeze(self, had_gradients)

    def _show(self, lrs: list[float]) -> None:
        """Put learning rates and the step into the groups, where users and checkpoints look."""
        self._shown = lrs
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr
            group["step"] = self._step

    def _freeze(self, g: int) -> None:
        self._settle()
        params = self.param_groups[g]["params"]
        if g not in self._frozen:
            earlier = set(map(id, frozen_by_schedule(params)))  # by the run that this one repeats
            self._frozen[g] = [p for p in params if p.requires_grad or id(p) in earlier]
            note_frozen(self._frozen[g])
        for p in params:
            p.requires_grad_(False)
            p.grad = None
            self.state.pop(p, None)
        self._runtime = None

    def _thaw(self, g: int) -> None:
        self._settle()
        thawed = self._frozen.pop(g, [])
        for p in thawed:
            p.requires_grad_(True)
        note_thawed(thawed)
        self._runtime = None

    def _apply_schedule(self, step: int) -> None:
        """Bring all groups to where the schedule is at a step; checks come first."""
        assert self._schedule is not None
        self._segments = check_scheduled_groups(self._schedule, self.param_groups)
        for group in self.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._remember_initial_lrs()
        self._events = {}
        for g, group_segments in enumerate(self._segments):
            for segment in group_segments:
                if segment.start < self._schedule.total_steps:
                    self._events.setdefault(segment.start, []).append((g, segment.frozen))
            latest = min(step, self._schedule.total_steps - 1)
            if [s for s in group_segments if s.start <= latest][-1].frozen:
                self._freeze(g)
            else:
                self._thaw(g)
        self._runtime = None
        self._step = step
        self._show(self._scheduled_lrs(step))
        self._notices = Notices()
        self._notices.freeze(self, set())

    def _scheduled_lrs(self, step: int) -> list[float]:
        if self._schedule is None:
            return []
        schedule = self._schedule
        table = SegmentTable(self._segments, schedule.eta_min, schedule.warmup_steps)
        return table.lrs(step, np.array([g["initial_lr"] for g in self.param_groups], float))

    def _check_initial_lrs(self, schedule: Schedule) -> None:
        """Raise unless each group's ``initial_lr``, which the user may change, is a rate."""
        try:
            if all(map(is_, map(_initial_lr_of, self.param_groups), self._initial_lrs)):
                return
        except KeyError:  # a group has none: named below
            pass
        for g, group in enumerate(self.param_groups):
            check_group_rate(schedule, g, "initial_lr", group.get("initial_lr"))
        self._remember_initial_lrs()

    def _remember_initial_lrs(self) -> None:
        """The groups' rates have been checked, and need not be again while they are the same."""
        # A tensor can change and be the same object: it is checked at every step.
        self._initial_lrs = [
            lr if isinstance(lr, (int, float)) else _UNCHECKED
            for lr in map(_initial_lr_of, self.param_groups)
        ]

    def _check_group_count(self) -> None:
        """Raise ValueError if groups were put into ``param_groups`` or taken out by hand."""
        if self._schedule is not None and len(self.param_groups) != len(self._shown):
            raise ValueError(
                f"param_groups must be the {len(self._shown)} groups that the schedule knows, got "
                f"{len(self.param_groups)}: add groups with add_param_group, and make a new "
                "optimizer to be without some"
            )

    def _check_schedule(self) -> None:
        if self._schedule is None:
            return
        if self._step >= self._schedule.total_steps:
            raise ValueError(
                f"step() was called after the schedule's total_steps={self._schedule.total_steps} "
                "steps. A step is a call of step(), one for each batch: total_steps must be epochs "
                "x batches per epoch, as len(loader) counts them"
            )
        self._check_initial_lrs(self._schedule)
        if list(map(_lr_of, self.param_groups)) != self._shown:
            g = next(g for g, lr in enumerate(self._shown) if self.param_groups[g]["lr"] != lr)
            raise ValueError(
                f"lr of parameter group {g} must be {self._shown[g]!r} as the schedule says, got "
                f"{self.param_groups[g]['lr']!r}. If a torch.optim.lr_scheduler sets it, leave "
                "out that scheduler's step(): the schedule sets the rates. To change one by hand, "
                "change group['initial_lr'], or make the optimizer without a schedule"
            )
