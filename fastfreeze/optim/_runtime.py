"""What an optimizer keeps between steps: plans for its parameters, and whether they still fit."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfreeze.kernels import choice
from fastfreeze.kernels.choice import PLANS
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.placements import Given, kind_of, place_of
from fastfreeze.kernels.plans import PlanSpec, dtype_of_state
from fastfreeze.layers.groups import check_number
from fastfreeze.optim._rule import UpdateRule
from fastfreeze.optim._shards import is_sharded, local_part, sharded_as
from fastfreeze.schedule import Segment

_grad_of = attrgetter("grad")
_params_of = itemgetter("params")
_lr_of = itemgetter("lr")

Groups = Sequence[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]
# A parameter, its group, its place among the optimizer's, its moments' dtype, its count of steps.
Member = tuple[Tensor, int, int, torch.dtype, float]


@dataclass(frozen=True)
class Task:
    """What an optimizer asks of its runtime.

    Attributes:
        rule: how a parameter is updated.
        groups, state: the optimizer's.
        left_out: the groups that are frozen.
        segments: each group's schedule; empty where there is none.
        eta_min, warmup_steps: the schedule's.
        state_dtype: of the state of 16-bit parameters; None for the parameters'.
        backend: the one asked for.
    """

    rule: UpdateRule
    groups: Groups
    state: State
    left_out: frozenset[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int
    state_dtype: torch.dtype | None
    backend: Backend | None

    def moments(self, param: Tensor, group: int) -> list[Tensor | None]:
        """What the state holds of a parameter's moments, of those that its group has."""
        state = self.state.get(param, {})
        return [state.get(name) for name in self.rule.kept(self.groups[group])]


class Runtime:
    """Plans for all parameters, and how to tell that they still fit the optimizer."""

    def __init__(self, task: Task) -> None:
        groups = task.groups
        lists = list(map(_params_of, groups))
        self.lengths = list(map(len, lists))
        params = list(chain.from_iterable(lists))
        self.scheduled = any(task.segments)
        self.hypers_of = itemgetter(*task.rule.keys, *["initial_lr"] * self.scheduled)
        self.hyper_values = [tuple(map(_copied, self.hypers_of(group))) for group in groups]
        self.has_tensors = any(map(_has_tensor, self.hyper_values))
        self.rule = task.rule
        self.hypers = self._rows(groups)
        self.left_out = task.left_out
        self.lr = task.rule.kernel.hypers.index("lr")
        groups_of = chain.from_iterable([g] * n for g, n in enumerate(self.lengths))
        members = [
            (p, g, place)
            for place, (p, g) in enumerate(zip(params, groups_of, strict=True))
            if g not in self.left_out
        ]
        for p, g, _ in members:
            _check(task, p, g)
        own = [local_part(p, p) for p, _, _ in members]
        self.parts = _parts(task, members, own)
        self.host = [part for part in self.parts if not part.plan.on_device]
        self.device = [part for part in self.parts if part.plan.on_device]
        self.cuda_devices = cuda_devices(own)
        self.state = task.state
        self.states = list(self.state.values())

    def serves(self, groups: Groups, state: State) -> bool:
        """Collect the gradients; False if the groups, the state or a part is not as planned."""
        lists = list(map(_params_of, groups))
        params = list(chain.from_iterable(lists))
        return (
            list(map(len, lists)) == self.lengths
            and list(map(self.hypers_of, groups)) == self.hyper_values
            and not (self.has_tensors and self._have_changed(groups))
            and state is self.state
            and len(state) == len(self.states)
            and all(map(is_, state.values(), self.states))
            and all(part.collect(params) for part in self.parts)
        )

    def _rows(self, groups: Groups) -> np.ndarray:
        rows = [self.rule.row(g, group) for g, group in enumerate(groups)]
        return np.array(rows, dtype=np.float64)

    def _have_changed(self, groups: Groups) -> bool:
        """Whether other numbers are in the groups' tensors, which may be the same objects."""
        rows = self._rows(groups)
        rows[:, self.lr] = self.hypers[:, self.lr]
        return not np.array_equal(rows, self.hypers, equal_nan=True)

    def groups_with_gradients(self) -> set[int]:
        """Those of which a parameter has had one, when they were collected last."""
        return {g for part in self.parts for g in part.given.of(part.groups)}

    def step(
        self, groups: Groups, step: int, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> list[float] | None:
        """Update with the gradients collected; without a schedule the groups' ``lr`` counts.

        Returns the groups' learning rates of the next step; None if nothing was updated.
        """
        if not self.scheduled:
            self._refresh_lrs(groups)
        lrs, host = None, self.host
        if host and found_inf is not None and found_inf.item():
            host = []
        scale = float(grad_scale) if host and grad_scale is not None else None
        for part in host:
            lrs = part.step(self.hypers, step, scale, None)
        for part in self.device:
            lrs = part.step(self.hypers, step, grad_scale, found_inf)
        if len(self.state) != len(self.states):  # there are new ones
            self.states = list(self.state.values())
        return lrs

    def capture(self, groups: Groups, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Record a step in the graph that is being captured."""
        if self.host:
            raise RuntimeError("a step can be captured only if all parameters are on the device")
        if not self.scheduled:
            self._refresh_lrs(groups)
        for part in self.parts:
            part.capture(self.hypers, grad_scale, found_inf)

    def position(self) -> int:
        """How many steps the device has taken."""
        positions: list[int] = [part.plan.position() for part in self.parts]
        return max(positions)

    def settle(self) -> bool:
        """Drop the state of parameters that have had no step; True if there was some."""
        return sum(part.settle() for part in self.parts) > 0  # each of them, not up to the first

    def _refresh_lrs(self, groups: Groups) -> None:
        try:
            self.hypers[:, self.lr] = [float(lr) for lr in map(_lr_of, groups)]
        except (TypeError, ValueError, RuntimeError):
            for g, group in enumerate(groups):
                check_number(f"lr of parameter group {g}", group["lr"])
            raise


def _parts(task: Task, members: list[tuple[Tensor, int, int]], params: list[Tensor]) -> list[Part]:
    """Plans for members (parameter, group, place), of which this process holds ``params``."""
    grads = [_held(p.grad) for p, _, _ in members]
    moments = [list(map(_held, task.moments(p, g))) for p, g, _ in members]
    backends = choice.choose_backends(params, grads, moments, task.backend)
    dtypes = [_planned_dtype(*each, task.state_dtype) for each in zip(params, moments, strict=True)]
    counts = counts_of(task.rule, [task.state.get(p, {}) for p, _, _ in members])
    if task.rule.counter is not None:
        _refer_started(task, counts, moments, backends)
    shared: dict[tuple[Backend, Hashable], list[Member]] = {}  # by backend and its plans' key
    for member, param, backend, dtype, count in zip(
        members, params, backends, dtypes, counts, strict=True
    ):
        key = backend, PLANS[backend].key(param, dtype)
        shared.setdefault(key, []).append((*member, dtype, count))
    parts = [Part(backend, own, task) for (backend, _), own in shared.items()]
    if len(parts) > 1:
        for part in parts:  # within the reference's, torch's order holds
            others = (other for other in parts if other.kernels or part.kernels)
            part.plan.keep_clear([t for other in others for t in other.written()])
    return parts


class Part:
    """The parameters that one backend updates, with their plan, which sees local tensors only."""

    def __init__(self, backend: Backend, members: list[Member], task: Task) -> None:
        self.params = [p for p, _, _, _, _ in members]
        self.groups = [g for _, g, _, _, _ in members]
        self.places = [place for _, _, place, _, _ in members]  # among the optimizer's
        self.sharded = any(map(is_sharded, self.params))
        self.backend = backend
        self.kernels = backend != "reference"
        self.grads: Sequence[Tensor] = []
        self.rule, self.state = task.rule, task.state
        self.names = [task.rule.kept(task.groups[g]) for g in self.groups]  # of its moments
        self.waiting: list[int] = []  # who will need state when a gradient first comes
        self.first: list[int] = []  # whose state the next step fills
        self.steps: Tensor | None = None  # each one's own count, of which the state holds views
        plan_type: Any = PLANS[backend]
        if task.rule.counter is not None:
            device = self.params[0].device if plan_type.on_device else torch.device("cpu")
            counts = [count for *_, count in members]
            self.steps = torch.tensor(counts, dtype=torch.float32, device=device)
        # Others' writes to the counts raise their version, kernels' do not. They matter: where a
        # count is 0, a kernel takes the moments as 0.
        counted = self.steps is not None and self.kernels and not self.steps.is_inference()
        self.counts = self.steps if counted else None
        self.edits = self.counts._version if self.counts is not None else 0
        # By parameter: the state that holds its tensors, these, and where they were.
        self.kept: dict[int, tuple[dict[str, Any], dict[str, Tensor], list[object]]] = {}
        moments: dict[str, list[Tensor | None]] = {
            name: [None] * len(members) for name in task.rule.moments
        }
        for i, (param, _, _, dtype, _) in enumerate(members):
            for name, moment in self._claim(i, param, dtype).items():
                moments[name][i] = moment
        filled_next = set(self.first)
        self.plan: Any = plan_type(
            PlanSpec(
                rule=task.rule.kernel,
                params=list(self._local(self.params)),
                moments=moments,
                first=[i in filled_next for i in range(len(members))],
                groups=self.groups,
                segments=task.segments,
                eta_min=task.eta_min,
                warmup_steps=task.warmup_steps,
                state_dtype=task.state_dtype,
                steps=self.steps,
            )
        )
        self._watch(Given([None] * len(members)))  # until gradients are collected

    def written(self) -> Iterable[Tensor | None]:
        """All that a step writes, other than gradients."""
        return chain(self.plan.params, *self.plan.moments.values())

    def _local(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        return [local_part(p, p) for p in params] if self.sharded else params

    def _grads_of(self, params: Sequence[Tensor]) -> Sequence[Any]:
        grads = list(map(_grad_of, params))
        return list(map(local_part, grads, params)) if self.sharded else grads

    def _claim(self, i: int, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A parameter's moments, as the backend needs them."""
        state = self.state.get(param, {})
        names = self.names[i]
        known = [name for name in names if state.get(name) is not None]
        if not known and names and param.grad is None:
            self.waiting.append(i)
            return {}
        if names and not known:
            self.first.append(i)
            if not self.kernels:  # the reference makes its own
                return {}
        own = local_part(param, param)
        moments = {
            name: choice.state_for(self.backend, own, local_part(state.get(name), param), dtype)
            for name in names
        }
        if known:
            for name in set(names).difference(known):  # its use was switched on later
                moments[name].zero_()
            self._keep(i, state, moments)
        return moments

    def _keep(self, i: int, state: dict[str, Any], moments: dict[str, Tensor]) -> None:
        """Let the state hold a parameter's moments, given as the plan has them."""
        kept = {name: sharded_as(moment, self.params[i]) for name, moment in moments.items()}
        if self.steps is not None and kept:
            kept = {str(self.rule.counter): self.steps[i], **kept}
        state.update(kept)
        self.kept[i] = state, kept, list(map(self._place, kept.values()))

    def _place(self, moment: Tensor) -> object:
        # Kernels keep addresses; sparse and sharded ones have none of their own.
        return place_of(moment) if self.kernels and not self.sharded else id(moment)

    def collect(self, everyone: Sequence[Tensor]) -> bool:
        """Collect the gradients; False if storages, moments or layouts are not as planned.

        ``everyone``: the optimizer's parameters, as they are now.
        """
        found = self._find(everyone)
        if found is None:
            return False
        given, grads = found
        try:
            if given is not self.given:
                if any(given.flags[i] for i in self.waiting) or not self._are_in_place():
                    return False
                self._watch(given)
            for named, states, values in self.columns:
                if not all(map(is_, map(named, states), values)):
                    return False
            known = self.kinds is None or list(map(kind_of, self.tensors)) == self.kinds
            if not known or (self.counts is not None and self.counts._version != self.edits):
                return False
            params = self._local(self.watched) if self.sharded else self.watched
            self.grads = self.plan.align(params, grads, self.given)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
            # Moved, sparse where it was dense, of another dtype or shape; a moment that is gone or
            # is none; or a tensor has become one of a kind that operators cannot look at. A new
            # plan takes it, or says why not.
            return False
        return True

    def _find(self, everyone: Sequence[Tensor]) -> tuple[Given, Sequence[Any]] | None:
        """Who has a gradient, and the gradients; None if a parameter is not the one planned.

        While the same parameters have one, the rest are not compared: a step leaves them alone.
        """
        watched = list(compress(everyone, self.live))
        if not all(map(is_, watched, self.watched)):
            return None
        grads = self._grads_of(watched)
        if self.given.hold(grads, map(_grad_of, compress(everyone, self.idle))):
            return self.given, grads
        if not all(map(is_, [everyone[place] for place in self.places], self.params)):
            return None
        grads = self._grads_of(self.params)
        given = Given(grads)
        return given, given.of(grads)

    def _are_in_place(self) -> bool:
        """Whether parameters and moments are as planned, those not looked at among them."""
        return self.plan.hold(self._local(self.params)) and all(
            list(map(self._place, kept.values())) == places
            for _, kept, places in self.kept.values()
        )

    def _watch(self, given: Given) -> None:
        """From now on, look at the parameters that have a gradient, and at their moments."""
        self.given = given
        self.watched = given.of(self.params)
        live = set(given.of(self.places))
        idle = set(self.places) - live
        self.live = [place in live for place in range(self.places[-1] + 1)]
        self.idle = [place in idle for place in range(self.places[-1] + 1)]
        kept = [self.kept[i] for i in given.index if i in self.kept]
        # By name: who looks it up, in which states, and what is to be found.
        self.columns: list[tuple[Any, list[dict[str, Any]], list[Tensor]]] = []
        for name in (self.rule.counter, *self.rule.moments):
            having = [(state, tensors[name]) for state, tensors, _ in kept if name in tensors]
            states, found = [s for s, _ in having], [t for _, t in having]
            if found:
                self.columns.append((itemgetter(name), states, found))
        self.tensors = [t for _, _, found in self.columns for t in found]
        self.kinds = list(map(kind_of, self.tensors)) if self.sharded or not self.kernels else None
        self.plan.watch([] if self.kinds else self.tensors)

    def step(
        self,
        hypers: np.ndarray,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        """Update with the gradients collected; the groups' learning rates of the next step."""
        lrs: list[float] = self.plan.step(self.grads, hypers, step, grad_scale, found_inf)
        if grad_scale is not None:
            self.restore_grads()
        self.grads = []
        if self.first:
            self._keep_started()
        return lrs

    def capture(
        self, hypers: np.ndarray, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Record a step with the gradients collected."""
        self.plan.capture(self.grads, hypers, grad_scale, found_inf)
        if grad_scale is not None:
            self.restore_grads()
        self.grads = []

    def _keep_started(self) -> None:
        """Let the state hold the moments of those that have had their first step."""
        started = [i for i in self.first if self.given.flags[i]]
        moments = self.plan.moments
        for i in started:
            own = {name: moments[name][i] for name in self.names[i]}
            self._keep(i, self.state[self.params[i]], own)
        self.first = [i for i in self.first if not self.given.flags[i]]
        if started:
            self._watch(self.given)

    def restore_grads(self) -> None:
        """Give gradients of another layout what the step has written into their copies."""
        choice.copy_back(self.grads, self._grads_of(self.watched))

    def settle(self) -> bool:
        """Drop the moments that have had no step; True if there were some."""
        known = [i for i in self.plan.unstarted() if self.params[i] in self.state]
        for i in known:
            state = self.state[self.params[i]]
            for name in (self.rule.counter, *self.names[i]):
                state.pop(name, None)
            if not state:
                del self.state[self.params[i]]
        return bool(known)


def cuda_devices(params: Iterable[Tensor]) -> set[torch.device]:
    """The CUDA devices on which they are."""
    return {p.device for p in params if p.is_cuda}


def _held(tensor: Tensor | None) -> Tensor | None:
    """What this process holds of it. Nothing is sent, as only one process may ask."""
    return tensor.to_local() if tensor is not None and is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _check(task: Task, param: Tensor, group: int) -> None:
    """Raise ValueError unless the gradient and the moments are where their parameter is."""
    if param.grad is not None and param.grad.is_sparse and not task.rule.kernel.takes_sparse:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    names = task.rule.kept(task.groups[group])
    moments = zip(names, task.moments(param, group), strict=True)
    for name, tensor in (("gradient", param.grad), *moments):
        what = f"a {name} of parameter group {group}"
        check_shape(what, tensor, param)
        if tensor is not None and tensor.device != param.device:
            raise ValueError(
                f"{what} must be on its parameter's device {param.device}, got {tensor.device}"
            )


def check_shape(what: str, tensor: Any, param: Tensor) -> None:
    """Raise ValueError unless it is None or a tensor of its parameter's shape."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} must be a tensor or None, got {tensor!r}")
    if tensor.shape != param.shape:
        shapes = tuple(param.shape), tuple(tensor.shape)
        raise ValueError(f"{what} must have its parameter's shape {shapes[0]}, got {shapes[1]}")


def _copied(value: Any) -> Any:
    """A hyperparameter to compare with later: a list, as of betas, can change and be the same."""
    return list(value) if isinstance(value, list) else value


def _has_tensor(values: Sequence[Any]) -> bool:
    """Whether there is one, also in the pairs among them: it can change, and be the same object."""
    return any(
        _has_tensor(value) if isinstance(value, (tuple, list)) else isinstance(value, Tensor)
        for value in values
    )


def counts_of(rule: UpdateRule, states: Iterable[Mapping[str, Any]]) -> list[float]:
    """Each parameter's own count of steps, 0 where nothing is kept; waits once for each device.

    Raises:
        TypeError, ValueError: there are moments without a count, or without what goes with them,
            or the count is no number >= 0.
    """
    counts: list[Any] = []
    for i, state in enumerate(states):
        kept = any(isinstance(state.get(n), Tensor) for n in rule.moments)
        missing = [n for n in rule.together if not isinstance(state.get(n), Tensor)]
        if kept and missing:
            raise ValueError(
                f"the state of parameter {i} must have {' and '.join(rule.together)}, got none for "
                f"{missing}"
            )
        counts.append(state.get(rule.counter) if kept and rule.counter else 0.0)
        check_number(f"{rule.counter} of parameter {i}", counts[i])
    for device in {c.device for c in counts if isinstance(c, Tensor)}:
        there = [i for i, c in enumerate(counts) if isinstance(c, Tensor) and c.device == device]
        found = torch.stack([counts[i].detach().reshape(()).double() for i in there]).tolist()
        for i, count in zip(there, found, strict=True):
            counts[i] = count
    for i, count in enumerate(counts):
        if not count >= 0:
            raise ValueError(f"{rule.counter} of parameter {i} must be >= 0, got {count}")
    return list(map(float, counts))


def _refer_started(
    task: Task,
    counts: Sequence[float],
    moments: Sequence[Sequence[Tensor | None]],
    backends: list[Backend],
) -> None:
    """Give the reference what has moments at count 0: a kernel would take them as 0."""
    for i, count in enumerate(counts):
        if count != 0 or not any(m is not None and m.any() for m in moments[i]):
            continue
        if task.backend not in (None, "reference"):
            raise ValueError(
                f"backend={task.backend!r} cannot take parameter {i}: its state has "
                f"{task.rule.counter} 0 and moments that are not 0"
            )
        backends[i] = "reference"


def _planned_dtype(
    param: Tensor, moments: Sequence[Tensor | None], state_dtype: torch.dtype | None
) -> torch.dtype:
    """The moments' dtype: they keep their own, as in torch, unless a wider one is asked for."""
    dtypes = [moment.dtype for moment in moments if moment is not None]
    dtype = reduce(torch.promote_types, dtypes) if dtypes else param.dtype
    return dtype_of_state(param, state_dtype) if dtype == param.dtype else dtype
