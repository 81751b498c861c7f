"""Members' graphs made into one, in which what members have in common runs once.

A node of one member stands for the same node of another if both call equal weights on values for
which the same holds: members that share a prefix bit for bit form a trie, which branches where
their weights begin to differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fastfreeze.ensemble._checks import logits_of
from fastfreeze.ensemble.graphs.dataflow import Dataflow, called_name, draws_random_numbers
from fastfreeze.ensemble.graphs.fold import CannotFoldError, fold
from fastfreeze.ensemble.graphs.program import Program, copied
from fastfreeze.ensemble.graphs.trace import IN_PLACE_FUNCTIONS, Trace
from fastfreeze.ensemble.members import CannotCopyError, Owners, copy_of
from fastfreeze.kernels.reference import softmax_add_reference
from fastfreeze.kernels.softmax_arguments import classes_back, classes_last


class CannotMergeError(Exception):
    """The members have to run one by one; the message says why."""


@dataclass(frozen=True)
class Merged:
    """The members as one graph.

    Attributes:
        graph: its first placeholder is a function that takes each member's output in turn, the
            others are the tensors of a call. Targets are names below ``members``.
        origins: for each node, by name, the name of the member's node that it is a copy of.
        num_nodes: nodes that compute, of all members.
        num_own: how many of them are left in the graph.
    """

    graph: fx.Graph
    origins: dict[str, str]
    num_nodes: int
    num_own: int


def merge(members: Sequence[nn.Module], trace: Trace, owners: Owners) -> Merged:
    """The members' graphs as one.

    Args:
        members: modules that differ in their tensors alone, in eval mode.
        trace: of the first.
        owners: of the members.

    Raises:
        CannotMergeError: the model writes to its inputs or to its own tensors.
    """
    flow = Dataflow(trace.graph, members[0])
    return _write(flow, _leaders(flow, owners, len(members)), len(members))


def merged_module(merged: Merged, ensemble: nn.Module) -> nn.Module:
    """A module of plain torch operations that returns the mean of the members' probabilities.

    It holds copies of the tensors of ``ensemble``, each once.

    Raises:
        CannotMergeError: a member's module has no copy.
    """
    root, members = nn.Module(), cast(nn.ModuleList, ensemble.members)
    dim = cast(int | None, ensemble.dim)
    root.members, root.plus, root.mean = members, _Plus(dim), _Mean(len(members), dim)
    root.in_place = nn.ModuleDict({f.__name__: _InPlace(f.__name__) for f in IN_PLACE_FUNCTIONS})
    try:
        return copy_of(fx.GraphModule(root, _with_average(merged)).eval())
    except CannotCopyError as error:
        raise CannotMergeError(error) from error


def fold_merged(merged: Merged, ensemble: nn.Module, metas: Mapping[str, Any]) -> Program:
    """The graph as a function of ``ensemble``, with norms folded into convolutions and so on.

    Args:
        ensemble: holds ``members``.
        metas: values of the first member's nodes, by name, on the meta device.

    Raises:
        CannotFoldError: there is nothing to fold, or the model draws random numbers.
    """
    if any(map(_is_random, merged.graph.nodes)):
        raise CannotFoldError("the model draws random numbers")
    known = {written: metas[name] for written, name in merged.origins.items() if name in metas}
    return fold(Dataflow(merged.graph, ensemble), known)


Leaders = dict[fx.Node, tuple[int, ...]]  # for each member, the member whose node stands for its


def _leaders(flow: Dataflow, owners: Owners, count: int) -> Leaders:
    """Who computes each node for whom.

    What one member writes to in place must not be read by another: such a storage, and what is
    made of it, is then each member's own.
    """
    own: set[fx.Node] = set()
    while True:
        leaders = _numbered(flow, owners, count, own)
        conflicts = _conflicts(flow, leaders) - own
        if not conflicts:
            return leaders
        for node in conflicts:
            if node.op in ("placeholder", "get_attr"):
                raise CannotMergeError(f"the model writes to {node.target} in place")
        own |= conflicts


def _numbered(flow: Dataflow, owners: Owners, count: int, own: set[fx.Node]) -> Leaders:
    leaders: Leaders = {}
    for node in flow.graph.nodes:
        if node.op == "placeholder":
            leaders[node] = (0,) * count
            continue
        if node in own or _is_random(node):
            leaders[node] = tuple(range(count))
            continue
        held = _owners_of_node(node, owners)
        first: dict[Any, int] = {}
        leaders[node] = tuple(
            first.setdefault(
                (*(row[m] for row in held), *(leaders[i][m] for i in node.all_input_nodes)), m
            )
            for m in range(count)
        )
    return leaders


def _is_random(node: fx.Node) -> bool:
    """Whether each member draws numbers of its own; dropout may be asked to, in eval mode too."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = called_name(node)
    if name == "scaled_dot_product_attention":
        at, given = 4, node.kwargs.get("dropout_p", 0.0)
    elif "dropout" in name:
        at, given = 2, node.kwargs.get("training", node.kwargs.get("train", True))
    else:
        return draws_random_numbers(node)
    return bool(node.args[at] if len(node.args) > at else given)


def _owners_of_node(node: fx.Node, owners: Owners) -> list[tuple[int, ...]]:
    """Of the tensors that a node reads from the model itself."""
    target = str(node.target)
    if node.op == "get_attr":
        return [owners[target]] if target in owners else []
    if node.op != "call_module":
        return []
    return [row for name, row in owners.items() if name.startswith(f"{target}.")]


def _conflicts(flow: Dataflow, leaders: Leaders) -> set[fx.Node]:
    """Storages, by the node that makes them, that a member could find changed by another's writes.

    What members have in common may be written to by what they have in common too, and be read by
    each on its own after the last write.
    """
    nodes = list(flow.graph.nodes)
    last_write = {s: at for at, node in enumerate(nodes) for s in flow.stores_to(node)}
    found = {s for s in last_write if s.op in ("get_attr", "placeholder")}
    for at, node in enumerate(nodes):
        for i in node.all_input_nodes:
            found |= {
                s
                for s in flow.storages[i]
                if at <= last_write.get(s, -1) and leaders[s] != leaders[node]
            }
    return found


def _write(flow: Dataflow, leaders: Leaders, count: int) -> Merged:
    """Depth first: a member's own nodes end before the next member's begin."""
    graph = fx.Graph()
    take = graph.placeholder("take")
    copies: dict[tuple[fx.Node, int], fx.Node] = {}
    origins: dict[str, str] = {}
    for node in flow.graph.nodes:
        if node.op == "placeholder":
            copies[node, 0] = graph.placeholder(node.name)
    for m in range(count):

        def now(node: fx.Node, m: int = m) -> fx.Node:
            return copies[node, leaders[node][m]]

        for node in flow.graph.nodes:
            if node.op == "output":
                graph.call_function(_taken, (take, map_arg(node.args[0], now)))
            elif node.op != "placeholder" and leaders[node][m] == m:
                written = copies[node, m] = copied(graph, node, now)
                if node.op in ("call_module", "get_attr"):
                    written.target = f"members.{m}.{node.target}"
                origins[written.name] = node.name
    graph.output(())
    computing = [node for node in flow.graph.nodes if flow.computes(node)]
    own = sum(len(set(leaders[node])) for node in computing)
    return Merged(graph, origins, count * len(computing), own)


def _taken(take: Callable[[Any], None], result: Any) -> None:
    take(result)


class _Plus(nn.Module):
    """A sum of probabilities with one more member's, classes last; fx does not look into it."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, logits: Tensor, total: Tensor | None = None) -> Tensor:
        return softmax_add_reference(total, classes_last(logits, self.dim), 1.0, 1.0)


class _InPlace(nn.Module):
    """An operator such as ``+=``, of which fx would make ``+`` when it reads the module again."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *args: Any) -> Any:
        return getattr(operator, self._name)(*args)


class _Mean(nn.Module):
    def __init__(self, count: int, dim: int | None) -> None:
        super().__init__()
        self.count, self.dim = count, dim

    def forward(self, total: Tensor, logits: Tensor) -> Tensor:
        return classes_back((total / self.count).to(logits.dtype), self.dim)


def _with_average(merged: Merged) -> fx.Graph:
    """The graph with the mean of the members' probabilities for its value."""
    graph = fx.Graph()
    _, *others = merged.graph.nodes  # without the function that takes outputs
    copies: dict[fx.Node, fx.Node] = {}
    total: fx.Node | None = None
    for node in others:
        if node.target is _taken:
            result = node.args[1]
            logits = map_arg(result, copies.__getitem__)
            if not isinstance(result, fx.Node) or isinstance(result.target, type):
                logits = graph.call_function(logits_of, (logits,))
            total = graph.call_module("plus", (logits, total))
        elif node.target in IN_PLACE_FUNCTIONS:
            args = map_arg(node.args, copies.__getitem__)
            copies[node] = graph.call_module(f"in_place.{called_name(node)}", args)
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(graph.call_module("mean", (total, logits)))
    return graph
