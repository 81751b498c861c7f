"""What runs for a kind of call of an ensemble: one graph, or member by member and why."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastfreeze.ensemble.graphs.flow import Flow, Program, written
from fastfreeze.ensemble.graphs.fold import fold
from fastfreeze.ensemble.graphs.trace import Call, NoGraphError, refused, trace
from fastfreeze.ensemble.members import MembersState, check_alike, share
from fastfreeze.ensemble.merge import merge
from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.compare import excess
from fastfreeze.trimming.state import requires_grad

MAX_KEPT = 8  # of the latest kinds of calls

# Tracing looks at all modules of the process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, eq=False)
class Prepared:
    """What runs for one kind of call.

    Attributes:
        text: what runs, and why nothing better does.
        state: of the members that it was made for.
        graph: of the members. None: they run one by one.
        program: the graph as a function of the ensemble, a function that takes each member's
            output in turn, and the call's tensors.
        folded: the program folded. None: it cannot be.
    """

    text: str
    state: MembersState | None = None
    graph: fx.Graph | None = None
    program: Program | None = None
    folded: Program | None = None

    def fits(self, members: nn.ModuleList) -> bool:
        """Whether the members' tensors, attributes and hooks are still those it was made for."""
        return self.state is not None and self.state.lasts(members)

    def choose(self, tensors: Sequence[Tensor]) -> Program | None:
        """The fastest program for a call with these tensors."""
        if self.folded is None or self.state is None:
            return self.program
        if any(torch.is_autocast_enabled(t.device.type) for t in tensors):
            return self.program
        if torch.is_grad_enabled() and requires_grad([*tensors, *self.state.parameters]):
            return self.program
        return self.folded


def prepare(ensemble: nn.Module, members: nn.ModuleList, call: Call, may_fold: bool) -> Prepared:
    """What runs for calls of this kind, found by running the members."""
    try:
        check_alike(members)
        with _ONE_AT_A_TIME:
            owners = share(list(members))
            flow = Flow(trace(members[0], call), members[0], *call.tensors)
            graph, what_runs = merge(flow, owners, len(members))
    except NoGraphError as error:
        return Prepared(one_by_one(members, error), MembersState(members))
    folded, how = None, "not folded: that was not wanted"
    if may_fold:
        try:
            folded, how = _folded(graph, ensemble, call.tensors), "folded"
        except NoGraphError as error:
            how = f"not folded: {error}"
    text = f"{len(members)} members as one graph, {what_runs}, {how}"
    return Prepared(text, MembersState(members), graph, written(graph), folded)


def one_by_one(members: nn.ModuleList, reason: object) -> str:
    """How the members run where there is no graph, in words."""
    return f"{len(members)} members, one by one: {reason}"


def _folded(graph: fx.Graph, ensemble: nn.Module, tensors: Sequence[Tensor]) -> Program:
    """The folded graph, which gives for these tensors what the graph itself gives."""
    expected: list[Any] = []
    found: list[Any] = []
    program = fold(Flow(graph, ensemble, expected.append, *tensors))
    with preserved(ensemble), torch.no_grad(), refused():
        program(ensemble, found.append, *(t.clone() for t in tensors))
    times = excess(found, expected)
    if not times <= 1:
        raise NoGraphError(f"folding changes values by {times:.1e} times what rounding may")
    return program
