"""What an optimizer keeps between steps: plans for its parameters, and whether they still fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfreeze.ops import sgd as sgd_ops
from fastfreeze.ops._library import Backend
from fastfreeze.ops._placements import Given, kind_of, place_of
from fastfreeze.ops._plans import HYPERS, PlanSpec, buffer_dtype
from fastfreeze.optim._shards import is_sharded, local_part, sharded_as

if TYPE_CHECKING:
    from fastfreeze.optim.sgd import SGD

_grad_of = attrgetter("grad")
_params_of = itemgetter("params")
_HYPERS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_hypers_of = itemgetter(*_HYPERS)
_scheduled_hypers_of = itemgetter(*_HYPERS, "initial_lr")
_lr_of = itemgetter("lr")
_buffer_of = itemgetter("momentum_buffer")
_LR = HYPERS.index("lr")


class Runtime:
    """Plans for all parameters, and how to tell that they still fit the optimizer."""

    def __init__(self, optimizer: SGD) -> None:
        groups = optimizer.param_groups
        lists = list(map(_params_of, groups))
        self.lengths = list(map(len, lists))
        self.params = list(chain.from_iterable(lists))
        self.hypers_of = _hypers_of if optimizer.schedule is None else _scheduled_hypers_of
        self.hyper_values = list(map(self.hypers_of, groups))
        self.has_tensors = any(isinstance(v, Tensor) for row in self.hyper_values for v in row)
        self.hypers = np.array([_hyper_row(g) for g in groups], dtype=np.float64)
        self.left_out = frozenset(optimizer._frozen)  # groups
        members = [
            (p, g) for g, params in enumerate(lists) if g not in self.left_out for p in params
        ]
        for p, g in members:
            _check_place(f"a gradient of parameter group {g}", p.grad, p)
            _check_place(f"a momentum_buffer of parameter group {g}", _buffer(optimizer, p, g), p)
        params = [local_part(p, p) for p, _ in members]
        self.parts = self._plan(members, params, optimizer)
        self.cuda_devices = cuda_devices(params)
        self._remember_state(optimizer)

    def _plan(
        self, members: list[tuple[Tensor, int]], params: list[Tensor], optimizer: SGD
    ) -> list[Part]:
        """Plans for all parameters. ``params``: what of them this process holds."""
        grads = [_held(p.grad) for p, _ in members]
        buffers = [_held(_buffer(optimizer, p, g)) for p, g in members]
        backends = sgd_ops.choose_backends(params, grads, buffers, optimizer._backend)
        dtypes = [
            _planned_dtype(*each, optimizer._momentum_dtype)
            for each in zip(params, buffers, strict=True)
        ]
        parts = [
            Part(backend, [(*members[i], dtypes[i]) for i in index], optimizer)
            for (backend, _), index in sgd_ops.plan_members(params, backends, dtypes).items()
        ]
        if len(parts) > 1:
            for part in parts:  # within the reference's, torch's order holds
                plans = (other.plan for other in parts if other.kernels or part.kernels)
                part.plan.keep_clear([t for plan in plans for t in (*plan.params, *plan.buffers)])
        return parts

    def _remember_state(self, optimizer: SGD) -> None:
        self.states = list(optimizer.state.values())

    def fits(self, optimizer: SGD) -> bool:
        """Whether the groups and the state are as planned."""
        groups, state = optimizer.param_groups, optimizer.state
        lists = list(map(_params_of, groups))
        return (
            list(map(len, lists)) == self.lengths
            and all(map(is_, chain.from_iterable(lists), self.params))
            and not self.has_tensors
            and list(map(self.hypers_of, groups)) == self.hyper_values
            and len(state) == len(self.states)
            and all(map(is_, state.values(), self.states))
        )

    def collect(self, optimizer: SGD) -> bool:
        """Collect the gradients; False if a part is not as planned."""
        return all(part.collect(optimizer) for part in self.parts)

    def groups_with_gradients(self) -> set[int]:
        """Those of which a parameter has had one, when they were collected last."""
        return {g for part in self.parts for g in part.given.of(part.groups)}

    def step(self, optimizer: SGD) -> list[float]:
        """Update with the gradients collected; the groups' learning rates of the next step."""
        self._refresh_lrs(optimizer)
        grad_scale, found_inf = _scaler_of(optimizer)
        step = optimizer._step
        lrs = None
        host = [part for part in self.parts if not part.plan.on_device]
        if host:
            scale = None if grad_scale is None else float(grad_scale)
            if found_inf is not None and found_inf.item():
                host = []
        for part in host:
            lrs = part.step(self.hypers, step, scale, None)
        for part in self.parts:
            if part.plan.on_device:
                lrs = part.step(self.hypers, step, grad_scale, found_inf)
        if len(optimizer.state) != len(self.states):  # there are new buffers
            self._remember_state(optimizer)
        return optimizer._scheduled_lrs(step + 1) if lrs is None else lrs

    def capture(self, optimizer: SGD) -> None:
        """Record a step in the graph that is being captured."""
        if not all(part.plan.on_device for part in self.parts):
            raise RuntimeError("a step can be captured only if all parameters are on the device")
        self._refresh_lrs(optimizer)
        grad_scale, found_inf = _scaler_of(optimizer)
        for part in self.parts:
            part.plan.capture(part.grads, self.hypers, grad_scale, found_inf)
            part.restore_grads(grad_scale)

    def position(self) -> int:
        """How many steps the device has taken."""
        positions: list[int] = [part.plan.position() for part in self.parts]
        return max(positions)

    def settle(self) -> bool:
        """Drop the momentum buffers that have had no step; whether there was one."""
        return sum(part.settle() for part in self.parts) > 0  # each of them, not up to the first

    def _refresh_lrs(self, optimizer: SGD) -> None:
        if optimizer.schedule is None:
            self.hypers[:, _LR] = [float(lr) for lr in map(_lr_of, optimizer.param_groups)]


class Part:
    """The parameters that one backend updates, with their plan, which sees local tensors only."""

    def __init__(
        self, backend: Backend, members: list[tuple[Tensor, int, torch.dtype]], optimizer: SGD
    ) -> None:
        self.params = [p for p, _, _ in members]
        self.groups = [g for _, g, _ in members]
        self.sharded = any(map(is_sharded, self.params))
        self.backend = backend
        self.kernels = backend != "reference"
        self.momentum_dtype = optimizer._momentum_dtype
        self.grads: list[Tensor | None] = []
        self.state = optimizer.state
        self.waiting: list[int] = []  # who will need a buffer when a gradient first comes
        self.first: list[int] = []  # whose buffer the next step fills
        # By parameter: the state that holds its momentum buffer, the buffer, and where that was.
        self.kept: dict[int, tuple[dict[str, Any], Tensor, object]] = {}
        buffers = [
            self._claim_buffer(i, *member)
            if optimizer.param_groups[member[1]]["momentum"] != 0
            else None
            for i, member in enumerate(members)
        ]
        filled_next = set(self.first)
        self.plan: Any = sgd_ops.PLANS[backend](
            PlanSpec(
                params=list(self._local(self.params)),
                buffers=buffers,
                first=[i in filled_next for i in range(len(members))],
                groups=self.groups,
                segments=optimizer._segments or [()] * len(optimizer.param_groups),
                eta_min=0.0 if optimizer.schedule is None else optimizer.schedule.eta_min,
                warmup_steps=0 if optimizer.schedule is None else optimizer.schedule.warmup_steps,
                momentum_dtype=self.momentum_dtype,
            )
        )
        self._watch(Given([None] * len(members)))  # until gradients are collected

    def _local(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        return [local_part(p, p) for p in params] if self.sharded else params

    def _local_grads(self) -> list[Tensor | None]:
        grads = list(map(_grad_of, self.params))
        return list(map(local_part, grads, self.params)) if self.sharded else grads

    def _claim_buffer(self, i: int, param: Tensor, _: int, dtype: torch.dtype) -> Tensor | None:
        state = self.state.get(param, {})
        buffer = state.get("momentum_buffer")
        if buffer is None and param.grad is None:
            self.waiting.append(i)
            return None
        own = local_part(buffer, param)
        aligned = sgd_ops.momentum_buffer_for(self.backend, local_part(param, param), own, dtype)
        if buffer is None:
            self.first.append(i)
        else:
            self._keep(i, state, sharded_as(aligned, param))
        return aligned

    def _keep(self, i: int, state: dict[str, Any], buffer: Tensor) -> None:
        state["momentum_buffer"] = buffer
        self.kept[i] = state, buffer, self._place(buffer)

    def _place(self, buffer: Tensor) -> object:
        # Kernels keep addresses; sparse and sharded ones have none of their own.
        return place_of(buffer) if self.kernels and not self.sharded else id(buffer)

    def collect(self, optimizer: SGD) -> bool:
        """Collect the gradients; False if storages, buffers or layouts are not as planned."""
        grads = self._local_grads()
        try:
            if not self.given.hold(grads):
                given = Given(grads)
                if any(given.flags[i] for i in self.waiting) or not self._are_in_place():
                    return False
                self._watch(given)
            if optimizer.state is not self.state or not self._has_buffers():
                return False
            self.grads = self.plan.align(self._local(self.watched), grads, self.given)
        except (ValueError, TypeError, RuntimeError):
            # Moved, sparse where it was dense, of another dtype or shape; or a tensor has become
            # one of a kind that operators cannot look at. A new plan takes it, or says why not.
            return False
        return True

    def _are_in_place(self) -> bool:
        """Whether parameters and buffers are as planned, those not looked at among them."""
        return self.plan.hold(self._local(self.params)) and all(
            self._place(buffer) == place for _, buffer, place in self.kept.values()
        )

    def _watch(self, given: Given) -> None:
        """From now on, look at the parameters that have a gradient, and at their buffers."""
        self.given = given
        self.watched = given.of(self.params)
        kept = [self.kept[i] for i in given.index if i in self.kept]
        self.states = [state for state, _, _ in kept]
        self.buffers = [buffer for _, buffer, _ in kept]
        self.kinds = list(map(kind_of, self.buffers)) if self.sharded or not self.kernels else None
        self.plan.watch([] if self.kinds else self.buffers)

    def _has_buffers(self) -> bool:
        """Whether the state holds the buffers that are looked at, if not where."""
        try:
            same = all(map(is_, map(_buffer_of, self.states), self.buffers))
            return same and (self.kinds is None or list(map(kind_of, self.buffers)) == self.kinds)
        except (KeyError, AttributeError, TypeError):  # what was a buffer is none
            return False

    def step(
        self,
        hypers: npt.NDArray[np.float64],
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        """Update with the gradients collected; the groups' learning rates of the next step."""
        lrs: list[float] = self.plan.step(self.grads, hypers, step, grad_scale, found_inf)
        self.restore_grads(grad_scale)
        started = [i for i in self.first if self.given.flags[i]]
        for i in started:
            param = self.params[i]
            self._keep(i, self.state[param], sharded_as(self.plan.buffers[i], param))
        if started:
            self.first = [i for i in self.first if not self.given.flags[i]]
            self._watch(self.given)
        return lrs

    def restore_grads(self, grad_scale: Tensor | float | None) -> None:
        """Give gradients of another layout what the step has written into their copies."""
        if grad_scale is not None:
            sgd_ops.copy_back(self.grads, self._local_grads())
        self.grads = []

    def settle(self) -> bool:
        """Drop the momentum buffers that have had no step; whether there was one."""
        known = [self.params[i] for i in self.plan.unstarted() if self.params[i] in self.state]
        for p in known:
            self.state[p].pop("momentum_buffer", None)
            if not self.state[p]:
                del self.state[p]
        return bool(known)


def cuda_devices(params: Iterable[Tensor]) -> set[torch.device]:
    """The CUDA devices on which they are."""
    return {p.device for p in params if p.is_cuda}


def check_shape(what: str, tensor: Any, param: Tensor) -> None:
    """Raise ValueError unless it is None or a tensor of its parameter's shape."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} must be a tensor or None, got {tensor!r}")
    if tensor.shape != param.shape:
        shapes = tuple(param.shape), tuple(tensor.shape)
        raise ValueError(f"{what} must have its parameter's shape {shapes[0]}, got {shapes[1]}")


def _check_place(what: str, tensor: Any, param: Tensor) -> None:
    """The same, and on its parameter's device."""
    check_shape(what, tensor, param)
    if tensor is not None and tensor.device != param.device:
        raise ValueError(
            f"{what} must be on its parameter's device {param.device}, got {tensor.device}"
        )


def _scaler_of(optimizer: SGD) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler has left: its scale, and whether it has found an overflow."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):  # 0 where there was no gradient to look at
        found_inf = None
    return getattr(optimizer, "grad_scale", None), found_inf


def _held(tensor: Tensor | None) -> Tensor | None:
    """What this process holds of it. Nothing is sent, as only one process may ask."""
    return tensor.to_local() if tensor is not None and is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _buffer(optimizer: SGD, param: Tensor, group: int) -> Tensor | None:
    """A parameter's momentum buffer, if it has one and its group uses it."""
    if optimizer.param_groups[group]["momentum"] == 0:
        return None
    buffer: Tensor | None = optimizer.state.get(param, {}).get("momentum_buffer")
    return buffer


def _planned_dtype(
    param: Tensor, buffer: Tensor | None, momentum_dtype: torch.dtype | None
) -> torch.dtype:
    """A buffer's dtype: it keeps its own, as in torch, unless ``momentum_dtype`` asks for wider."""
    if buffer is None or (momentum_dtype is not None and buffer.dtype == param.dtype):
        return buffer_dtype(param, momentum_dtype)
    return buffer.dtype


def _hyper_row(group: dict[str, Any]) -> list[float]:
    return [float(group.get(name, 0.0)) for name in HYPERS]
