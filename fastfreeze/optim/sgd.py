"""SGD: a drop-in for ``torch.optim.SGD`` that steps all groups at once and knows its schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter, is_, itemgetter
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.ops import sgd as sgd_ops
from fastfreeze.ops._library import Backend, require
from fastfreeze.schedule import Cosine, Schedule, Segment, check_initial_lr, segments_lr

_grad_of = attrgetter("grad")
_params_of = itemgetter("params")
_HYPERS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_hypers_of = itemgetter(*_HYPERS)
_scheduled_hypers_of = itemgetter(*_HYPERS, "initial_lr")
_lr_of = itemgetter("lr")
_buffer_of = itemgetter("momentum_buffer")
# Attributes besides torch's that a copy or a pickle keeps; plans are made anew.
_PICKLED = (
    "_schedule",
    "_backend",
    "_step",
    "_frozen",
    "_segments",
    "_events",
    "_shown",
    "_step_supports_amp_scaling",
)
_LR = sgd_ops.HYPERS.index("lr")


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
        backend: what runs the step: "cpu", "reference", or None for the fastest that can take each
            parameter. A backend given by name never gives way to another.

    Raises:
        ValueError: a value out of its range, a schedule that freezes without layers, or parameters
            that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.

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
        backend: Backend | None = None,
    ) -> None:
        _check_hypers(lr, momentum, weight_decay, nesterov, dampening)
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the update is not recorded by autograd; "
                "use torch.optim.SGD for it"
            )
        if foreach and fused:
            raise RuntimeError("foreach and fused cannot both be True")
        if backend is not None:
            require(backend)
        self._schedule = _schedule_of(schedule, total_steps)
        self._backend = backend
        self._step = 0
        self._frozen: dict[
            int, list[Tensor]
        ] = {}  # group: the parameters that freezing switched off
        self._segments: list[tuple[Segment, ...]] = []  # of each group
        self._events: dict[int, list[tuple[int, bool]]] = {}  # step: groups, frozen from it or not
        self._shown: list[float] = []  # each group's lr, as last set by the schedule
        self._runtime: _Runtime | None = None
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
        if self._schedule is not None:
            self._apply_schedule()
        # A GradScaler then leaves the division by its scale, and the skipping, to step().
        self._step_supports_amp_scaling = True

    @property
    def schedule(self) -> Schedule | None:
        """The schedule; None if the groups' ``lr`` is left to the user."""
        return self._schedule

    @property
    def current_step(self) -> int:
        """How many times ``step()`` has been called; set it to go to another point of the schedule.

        Raises:
            ValueError: set to a step outside the schedule's ``0..total_steps``.
        """
        return self._step

    @current_step.setter
    def current_step(self, step: int) -> None:
        if step < 0 or (self._schedule is not None and step > self._schedule.total_steps):
            limit = "" if self._schedule is None else f"..{self._schedule.total_steps}"
            raise ValueError(f"current_step must be in 0{limit}, got {step}")
        self._step = step
        if self._schedule is not None:
            self._apply_schedule()

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are frozen now, rising."""
        return tuple(sorted({self.param_groups[g].get("layer_index", g) for g in self._frozen}))

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
            ValueError: the schedule's ``total_steps`` have been taken, or somebody else has changed
                a scheduled group's ``lr``. Nothing has been changed then.
        """
        self._check_schedule()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not found_inf.item():
            lrs = self._update()
        else:
            lrs = self._scheduled_lrs(self._step + 1)
        self._step += 1
        if self._schedule is not None:
            self._advance(lrs)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; a schedule counts it from the current step on."""
        super().add_param_group(param_group)
        if self._shown:  # not while the first groups are being made
            try:
                self._apply_schedule()
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's, which can load it; the step is in each group, the schedule beside them."""
        for group in self.param_groups:
            group["step"] = self._step
        try:
            state: dict[str, Any] = super().state_dict()
        finally:
            for group in self.param_groups:
                del group["step"]
        if self._schedule is not None:
            state["schedule"] = self._schedule.config()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of ``torch.optim.SGD``, and freeze what was frozen.

        Raises:
            ValueError: the groups do not match, or the state belongs to another schedule.
        """
        saved = state_dict.get("schedule")
        if self._schedule is not None and saved is not None and saved != self._schedule.config():
            raise ValueError(
                f"the state was saved under schedule {saved}, this optimizer has "
                f"{self._schedule.config()}; make it with the same schedule, or delete "
                "state_dict['schedule'] to go on under the new one"
            )
        steps = {group.get("step") for group in state_dict["param_groups"]}
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, own, strict=True):
            group.pop("step", None)
            for key, value in before.items():  # torch's states know no layers
                group.setdefault(key, value)
        if steps != {None} and len(steps) == 1:
            self._step = steps.pop()
        elif self._schedule is not None:
            warnings.warn(
                "the loaded state has no step counter (torch.optim.SGD keeps none): the schedule "
                f"goes on from step {self._step}; set optimizer.current_step",
                FastfreezeWarning,
                stacklevel=2,
            )
        if self._schedule is not None:
            self._apply_schedule()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, **{name: getattr(self, name) for name in _PICKLED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runtime = None
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)

    def _update(self) -> list[float]:
        grad_scale = getattr(self, "grad_scale", None)
        scale = None if grad_scale is None else float(grad_scale)
        runtime = self._runtime
        if runtime is None or not (runtime.fits(self) and runtime.collect(self)):
            runtime = self._runtime = _Runtime(self)
            if not runtime.collect(self):
                raise RuntimeError("parameters or gradients change while they are being read")
        return runtime.step(self, scale)

    def _advance(self, lrs: list[float]) -> None:
        """Show the next step's learning rates, and freeze or thaw what is due at it."""
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr
        self._shown = lrs
        for g, frozen in self._events.get(self._step, ()):
            if frozen:
                self._freeze(g)
            else:
                self._thaw(g)

    def _freeze(self, g: int) -> None:
        params = self.param_groups[g]["params"]
        self._frozen.setdefault(g, [p for p in params if p.requires_grad])
        for p in params:
            p.requires_grad_(False)
            p.grad = None
            self.state.pop(p, None)
        self._runtime = None

    def _thaw(self, g: int) -> None:
        for p in self._frozen.pop(g, ()):
            p.requires_grad_(True)
        self._runtime = None

    def _apply_schedule(self) -> None:
        """Bring all groups to where the schedule is at the current step; checks come first."""
        assert self._schedule is not None
        segments = self._group_segments()
        for group in self.param_groups:
            check_initial_lr(self._schedule, float(group.get("initial_lr", group["lr"])))
        for group in self.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._segments = segments
        self._events = {}
        for g, group_segments in enumerate(segments):
            for segment in group_segments:
                if segment.start < self._schedule.total_steps:
                    self._events.setdefault(segment.start, []).append((g, segment.frozen))
            at = [s for s in group_segments if s.start <= self._step][-1]
            if at.frozen and self._step < self._schedule.total_steps:
                self._freeze(g)
            elif not at.frozen:
                self._thaw(g)
        self._runtime = None
        self._shown = self._scheduled_lrs(self._step)
        for group, lr in zip(self.param_groups, self._shown, strict=True):
            group["lr"] = lr

    def _group_segments(self) -> list[tuple[Segment, ...]]:
        assert self._schedule is not None
        if not self._schedule.freezes:
            return [self._schedule.segments()] * len(self.param_groups)
        for g, group in enumerate(self.param_groups):
            if "layer_index" not in group:
                raise ValueError(
                    f"schedule {type(self._schedule).__name__} freezes layer by layer, but "
                    f"parameter group {g} has no 'layer_index': pass "
                    "fastfreeze.split(model).param_groups()"
                )
        most = max(group["layer_index"] for group in self.param_groups) + 1
        return [
            self._schedule.segments(group["layer_index"], group.get("num_layers", most))
            for group in self.param_groups
        ]

    def _scheduled_lrs(self, step: int) -> list[float]:
        if self._schedule is None:
            return []
        eta_min = self._schedule.eta_min
        return [
            float(segments_lr(segments, step, group["initial_lr"], eta_min))
            for group, segments in zip(self.param_groups, self._segments, strict=True)
        ]

    def _check_schedule(self) -> None:
        if self._schedule is None:
            return
        if self._step >= self._schedule.total_steps:
            raise ValueError(
                f"step() was called after the schedule's total_steps={self._schedule.total_steps}"
            )
        if list(map(_lr_of, self.param_groups)) != self._shown:
            g = next(g for g, lr in enumerate(self._shown) if self.param_groups[g]["lr"] != lr)
            raise ValueError(
                f"lr of parameter group {g} must be {self._shown[g]!r} as the schedule says, got "
                f"{self.param_groups[g]['lr']!r}: change group['initial_lr'] instead, or make the "
                "optimizer without a schedule"
            )


class _Runtime:
    """One plan per backend in use, and how to tell that they still fit the optimizer."""

    def __init__(self, optimizer: SGD) -> None:
        groups = optimizer.param_groups
        self.lists = list(map(_params_of, groups))
        self.count = sum(map(len, self.lists))
        self.hypers_of = _hypers_of if optimizer.schedule is None else _scheduled_hypers_of
        self.hyper_values = list(map(self.hypers_of, groups))
        self.has_tensors = any(isinstance(v, Tensor) for row in self.hyper_values for v in row)
        self.hypers = np.array([_hyper_row(g) for g in groups], dtype=np.float64)
        members = [
            (p, g)
            for g, params in enumerate(self.lists)
            if g not in optimizer._frozen
            for p in params
        ]
        by_backend: dict[Backend, list[tuple[Tensor, int]]] = {}
        backends = _backends_of([p for p, _ in members], optimizer._backend)
        for member, backend in zip(members, backends, strict=True):
            by_backend.setdefault(backend, []).append(member)
        self.parts = [_Part(b, m, optimizer) for b, m in by_backend.items()]

    def fits(self, optimizer: SGD) -> bool:
        """Whether the groups are as planned."""
        groups = optimizer.param_groups
        lists = list(map(_params_of, groups))
        return (
            len(lists) == len(self.lists)
            and all(map(is_, lists, self.lists))
            and sum(map(len, lists)) == self.count
            and not self.has_tensors
            and list(map(self.hypers_of, groups)) == self.hyper_values
        )

    def collect(self, optimizer: SGD) -> bool:
        """Collect the gradients; False if a part is not as planned."""
        return all(part.collect(optimizer) for part in self.parts)

    def step(self, optimizer: SGD, grad_scale: float | None) -> list[float]:
        """Update with the gradients collected; the groups' learning rates of the next step."""
        if optimizer.schedule is None:
            self.hypers[:, _LR] = [float(lr) for lr in map(_lr_of, optimizer.param_groups)]
        step = optimizer.current_step
        lrs = [part.step(self.hypers, step, grad_scale) for part in self.parts]
        return lrs[0] if lrs else optimizer._scheduled_lrs(step + 1)


class _Part:
    """The parameters that one backend updates, with their plan."""

    def __init__(self, backend: Backend, members: list[tuple[Tensor, int]], optimizer: SGD) -> None:
        self.params = [p for p, _ in members]
        self.pointers = _pointers(self.params)
        self.grads: list[Tensor | None] = []
        self.state = optimizer.state
        self.waiting: list[int] = []  # who will need a buffer when a gradient first comes
        self.first: list[int] = []  # whose buffer the next step fills
        self.states: list[dict[str, Any]] = []  # of those with a buffer,
        self.buffers: list[Tensor] = []  # and the buffers
        buffers = [
            self._claim_buffer(i, p) if optimizer.param_groups[g]["momentum"] != 0 else None
            for i, (p, g) in enumerate(members)
        ]
        filled_next = set(self.first)
        self.plan = sgd_ops.PLANS[backend](
            self.params,
            buffers,
            [i in filled_next for i in range(len(members))],
            [g for _, g in members],
            optimizer._segments or [()] * len(optimizer.param_groups),
            0.0 if optimizer.schedule is None else optimizer.schedule.eta_min,
        )

    def _claim_buffer(self, i: int, param: Tensor) -> Tensor | None:
        state = self.state.get(param, {})
        buffer = state.get("momentum_buffer")
        if buffer is None and param.grad is None:
            self.waiting.append(i)
            return None
        aligned = sgd_ops.momentum_buffer_like(param, buffer)
        if buffer is None:
            self.first.append(i)
        else:
            state["momentum_buffer"] = aligned
            self.states.append(state)
            self.buffers.append(aligned)
        return aligned

    def collect(self, optimizer: SGD) -> bool:
        """Collect the gradients; False if storages, buffers or layouts are not as planned."""
        grads = list(map(_grad_of, self.params))
        if (
            _pointers(self.params) != self.pointers
            or any(grads[i] is not None for i in self.waiting)
            or optimizer.state is not self.state
            or len(self.state) < len(self.states)
            or not all(map(is_, map(_buffer_of, self.states), self.buffers))
        ):
            return False
        try:
            self.grads = self.plan.align(grads)
        except ValueError:  # a sparse gradient where there was a dense one
            return False
        return True

    def step(
        self, hypers: npt.NDArray[np.float64], step: int, grad_scale: float | None
    ) -> list[float]:
        """Update with the gradients collected; the groups' learning rates of the next step."""
        lrs: list[float] = self.plan.step(self.grads, hypers, step, grad_scale)
        if grad_scale is not None:
            sgd_ops.copy_back(self.grads, list(map(_grad_of, self.params)))
        self.grads = []
        for i in self.first:
            state = self.state[self.params[i]]
            state["momentum_buffer"] = self.plan.buffers[i]
            self.states.append(state)
            self.buffers.append(self.plan.buffers[i])
        self.first = []
        return lrs


def _backends_of(params: list[Tensor], backend: Backend | None) -> list[Backend]:
    """The backend of each parameter, sparse gradients being the reference's."""
    backends = sgd_ops.choose_backends(params, backend)
    for i, p in enumerate(params):
        if p.grad is not None and p.grad.layout != torch.strided:
            if backend not in (None, "reference"):
                raise ValueError(
                    f"backend={backend!r} cannot take the {p.grad.layout} gradient of parameter {i}"
                )
            backends[i] = "reference"
    return backends


def _pointers(params: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, params))


def _hyper_row(group: dict[str, Any]) -> list[float]:
    return [float(group.get(name, 0.0)) for name in sgd_ops.HYPERS]


def _schedule_of(schedule: Schedule | None, total_steps: int | None) -> Schedule | None:
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


def _check_hypers(
    lr: float | Tensor, momentum: float, weight_decay: float, nesterov: bool, dampening: float
) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must have one element, got shape {tuple(lr.shape)}")
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening 0, got momentum={momentum} and "
            f"dampening={dampening}"
        )
