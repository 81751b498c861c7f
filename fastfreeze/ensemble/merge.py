"""Members' graphs made into one, in which what members have in common runs once.

A node runs once for two members if it reads equal weights of both, and values that are computed
once for both. Members that share a prefix bit for bit form a trie, which branches where their
weights begin to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fastfreeze.ensemble._checks import logits_of
from fastfreeze.ensemble.graphs.flow import Flow, copied
from fastfreeze.ensemble.members import Owners, copy_of
from fastfreeze.kernels.reference import ensemble_softmax_reference
from fastfreeze.kernels.softmax_arguments import classes_back, classes_last

# By node, for each member: the member whose node runs in the place of its own.
Leaders = dict[fx.Node, tuple[int, ...]]


def merge(flow: Flow, owners: Owners, count: int) -> tuple[fx.Graph, str]:
    """One graph for ``count`` members, which differ in their tensors alone.

    Args:
        flow: of the first member, in eval mode.
        owners: of the members.

    Returns:
        The graph: its first placeholder is a function that takes each member's output in turn, the
        others are the tensors of a call; targets are names below ``members``. And how many of the
        members' nodes run in it, in words.
    """
    leaders = _leaders(flow, owners, count)
    computing = [n for n in flow.graph.nodes if n.op.startswith("call_") and flow.storages[n]]
    own = sum(len(set(leaders[node])) for node in computing)
    graph = _merged_graph(flow.graph, leaders, count)
    return graph, f"{own} of {count * len(computing)} nodes run"


def merged_module(graph: fx.Graph, members: nn.ModuleList, dim: int | None) -> nn.Module:
    """A module of plain torch operations that returns the mean of the members' probabilities.

    It holds copies of the members' tensors, each once.

    Raises:
        CannotCopyError: a member's module has no copy.
    """
    root = nn.Module()
    root.members, root.mean = members, _Mean(dim)
    with_mean, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    take, *others, _ = graph.nodes
    taken = [node for node in others if take in node.all_input_nodes]
    for node in others:
        if node not in taken:
            copies[node] = with_mean.node_copy(node, copies.__getitem__)
    outputs = map_arg(tuple(node.args[1] for node in taken), copies.__getitem__)
    with_mean.output(with_mean.call_module("mean", outputs))
    return copy_of(fx.GraphModule(root, with_mean).eval())


class _Mean(nn.Module):
    """The mean of the probabilities in members' outputs; fx does not look into it."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *outputs: Any) -> Tensor:
        logits = [classes_last(logits_of(output), self.dim) for output in outputs]
        return classes_back(ensemble_softmax_reference(logits, None, 1.0, log=False), self.dim)


def _leaders(flow: Flow, owners: Owners, count: int) -> Leaders:
    """The leaders of each node.

    Where a member would find a value changed by a write of another member, the node that made the
    value runs for each member, and so do the nodes that read it.
    """
    own = set(flow.random)  # members draw numbers of their own
    while True:
        leaders = _shared(flow.graph, owners, count, own)
        conflicts = _conflicts(flow, leaders) - own
        if not conflicts:
            return leaders
        own |= conflicts


def _shared(graph: fx.Graph, owners: Owners, count: int, own: set[fx.Node]) -> Leaders:
    """Leaders where equal weights are called on equal values; nodes in ``own`` share nothing."""
    leaders: Leaders = {}
    for node in graph.nodes:
        if node in own:
            leaders[node] = tuple(range(count))
            continue
        read = [*_owners_of(node, owners), *(leaders[i] for i in node.all_input_nodes)]
        first: dict[Any, int] = {}
        leaders[node] = tuple(first.setdefault(tuple(r[m] for r in read), m) for m in range(count))
    return leaders


def _owners_of(node: fx.Node, owners: Owners) -> list[tuple[int, ...]]:
    """The owners of the tensors that a node reads from the model itself."""
    if node.op not in ("get_attr", "call_module"):
        return []
    target = str(node.target)
    return [row for name, row in owners.items() if f"{name}.".startswith(f"{target}.")]


def _conflicts(flow: Flow, leaders: Leaders) -> set[fx.Node]:
    """The nodes whose values a member could find changed by a write of another member.

    A value that members have in common may be written to by a node that they have in common, and
    read by a member's own node after the last write.
    """
    nodes = list(flow.graph.nodes)
    makers = {s: node for node in reversed(nodes) for s in flow.storages[node]}
    last_write = {s: at for at, node in enumerate(nodes) for s in flow.writes[node]}
    return {
        makers[s]
        for at, node in enumerate(nodes)
        for read in node.all_input_nodes
        for s in flow.storages[read]
        if at <= last_write.get(s, -1) and leaders[makers[s]] != leaders[node]
    }


def _merged_graph(graph: fx.Graph, leaders: Leaders, count: int) -> fx.Graph:
    """Depth first: a member's own nodes end before the next member's begin."""
    merged = fx.Graph()
    take = merged.placeholder("take")
    copies: dict[tuple[fx.Node, int], fx.Node] = {}
    for m in range(count):

        def now(node: fx.Node, m: int = m) -> fx.Node:
            return copies[node, leaders[node][m]]

        for node in graph.nodes:
            if node.op == "output":
                merged.call_function(_taken, (take, map_arg(node.args[0], now)))
            elif leaders[node][m] == m:
                written = copies[node, m] = copied(merged, node, now)
                if node.op in ("call_module", "get_attr"):
                    written.target = f"members.{m}.{node.target}"
    merged.output(())
    return merged


def _taken(take: Callable[[Any], None], result: Any) -> None:
    take(result)
