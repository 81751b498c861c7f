"""How an ensemble runs for one way of calling it: as one graph, or member by member and why."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.ensemble.graphs.fold import CannotFoldError
from fastfreeze.ensemble.graphs.held import Held, autocasts
from fastfreeze.ensemble.graphs.program import Program, measured, written
from fastfreeze.ensemble.graphs.trace import CallPattern, Trace, UntraceableError, hooked, trace
from fastfreeze.ensemble.members import MembersState, difference, share
from fastfreeze.ensemble.merge import (
    CannotMergeError,
    Merged,
    fold_merged,
    merge,
    merged_module,
)
from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.compare import excess
from fastfreeze.trimming.state import requires_grad

MAX_KEPT = 8  # of the latest kinds of calls

# Tracing looks at all modules of the process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Key:
    """What a plan is made for: all about a call but the batch size and the tensors' values."""

    pattern: CallPattern
    kinds: tuple[Any, ...]
    may_fold: bool

    @classmethod
    def of(
        cls, member: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], may_fold: bool
    ) -> tuple[Key, list[Tensor]]:
        """The key of a call, and the call's tensors in order.

        Raises:
            UntraceableError: an argument is of a type that a graph cannot hold.
        """
        pattern, tensors = CallPattern.of(member, args, kwargs)
        kinds = tuple((t.shape[1:], t.dtype, t.device) for t in tensors)
        return cls(pattern, kinds, may_fold), tensors


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for one key.

    Attributes:
        text: what runs, and why nothing better does.
        program: takes the ensemble, then a function that is given each member's output in turn,
            then the call's tensors. None: the members run one by one.
        folded: the same, folded; None where that cannot be.
    """

    text: str
    _state: MembersState | None = None
    _traced: Trace | None = None
    _merged: Merged | None = None
    program: Program | None = None
    folded: Program | None = None

    def fits(self, members: nn.ModuleList) -> bool:
        """Whether the members' tensors, attributes and hooks are still those it was made for."""
        if self._state is None or not self._state.lasts(members):
            return False
        return self._traced is None or not self._traced.stale()

    def choose(self, tensors: Sequence[Tensor]) -> Program | None:
        """The fastest program for a call with these tensors."""
        if self.folded is None or self._state is None or autocasts(tensors):
            return self.program
        if torch.is_grad_enabled() and requires_grad([*tensors, *self._state.parameters]):
            return self.program
        return self.folded

    def module(self, ensemble: nn.Module) -> nn.Module:
        """The graph and the average as a module of its own.

        Raises:
            ValueError: there is no graph, or a part of it has no copy.
        """
        if self._merged is None:
            raise ValueError(f"the ensemble cannot be one graph: {self.text}")
        try:
            return merged_module(self._merged, ensemble)
        except CannotMergeError as error:
            raise ValueError(f"the ensemble cannot be one graph: {error}") from error


def one_by_one(count: int, reason: object) -> str:
    """The text of a plan without a graph."""
    return f"{count} members, one by one: {reason}"


def make_plan(
    ensemble: nn.Module, members: nn.ModuleList, key: Key, tensors: Sequence[Tensor]
) -> Plan:
    """A plan for calls of a kind, of which ``tensors`` are those of one; members run for it."""
    count = len(members)
    try:
        if what := difference(list(members)):
            raise CannotMergeError(what)
        with _ONE_AT_A_TIME:
            owners = share(list(members))
            traced, metas = _traced(members, key, tensors)
            merged = merge(list(members), traced, owners)
    except (CannotMergeError, UntraceableError) as error:
        return Plan(one_by_one(count, error), MembersState(members))
    program = written(merged.graph)
    folded, text = None, "not folded: that was not wanted"
    if key.may_fold:
        try:
            folded, text = fold_merged(merged, ensemble, metas), "folded"
            _check_folded(program, folded, ensemble, tensors)
        except CannotFoldError as error:
            folded, text = None, f"not folded: {error}"
    runs = f"{merged.num_own} of {merged.num_nodes} nodes run"
    text = f"{count} members as one graph, {runs}, {text}"
    return Plan(text, MembersState(members), traced, merged, program, folded)


def _check_folded(
    program: Program, folded: Program, ensemble: nn.Module, tensors: Sequence[Tensor]
) -> None:
    """CannotFoldError unless the folded graph gives for these tensors what it gives as it is."""
    with preserved(ensemble), torch.no_grad():
        expected = _outputs(program, ensemble, tensors)
        try:
            found = _outputs(folded, ensemble, tensors)
        except Exception as error:  # of whatever kind: it runs as it is
            raise CannotFoldError(f"{type(error).__name__}: {error}") from error
    times = excess(found, expected)
    if not times <= 1:
        raise CannotFoldError(f"folding changes values by {times:.1e} times what rounding may")


def _outputs(program: Program, ensemble: nn.Module, tensors: Sequence[Tensor]) -> list[Any]:
    found: list[Any] = []
    program(ensemble, found.append, *(t.clone() for t in tensors))
    return found


def _traced(
    members: nn.ModuleList, key: Key, tensors: Sequence[Tensor]
) -> tuple[Trace, dict[str, Any]]:
    """The first member's trace, and its nodes' values by name, on the meta device."""
    held = Held(list(members))
    if any(m.training for m in held.modules):
        raise CannotMergeError("a member is in training mode")
    if name := hooked(held.modules):
        raise CannotMergeError(f"{name} has hooks")
    if any(t.is_meta for t in held.tensors()):
        raise CannotMergeError("on the meta device nothing can be compared")
    if any(t.is_inference() for t in held.tensors()):
        raise CannotMergeError("its tensors were made in inference mode, where writes go unnoticed")
    first = members[0]
    traced = trace(first, key.pattern)
    run, metas = measured(traced.graph)
    versions = [b._version for b in first.buffers()]
    with preserved(first), torch.no_grad():
        run(first, *(t.clone() for t in tensors))
        if [b._version for b in first.buffers()] != versions:
            raise CannotMergeError("the model writes to its buffers")
    return traced, metas
