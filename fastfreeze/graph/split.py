"""The frozen prefix as a part of its own: what to run first, and what to hand over.

A frozen node may run ahead of everything else if all that it reads can. What is then handed over
is chosen by a minimum cut: the fewest bytes through which everything passes that the rest reads,
where frozen nodes that cost little more than a pass over memory (norms, activations, pooling,
``cat``) may as well run again behind the cut. Nodes with weights are never run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fastfreeze.trim.state import tensors_in
from fastfreeze.graph.cut import ATEN_NAMES, Cut, Dataflow, called_name

Nodes = frozenset[fx.Node]

_CHEAP_FILES = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *("activation", "batchnorm", "channelshuffle", "dropout", "flatten", "instancenorm"),
        *("normalization", "padding", "pixelshuffle", "pooling", "upsampling"),
    )
)
_CHEAP_NAMES = frozenset(  # besides those that work element by element
    (
        *("softmax", "log_softmax", "normalize", "dropout", "stochastic_depth", "drop_path"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "channel_shuffle"),
        *("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "mean", "sum", "amax", "interpolate"),
        *("cat", "concat", "stack", "chunk", "split", "getitem", "narrow", "select", "unbind"),
        *("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze"),
        *("unsqueeze", "expand", "repeat", "movedim", "pad", "roll", "to", "float", "half"),
    )
)


class CannotSplitError(Exception):
    """The frozen prefix cannot run ahead of the rest; the message says why."""


@dataclass(frozen=True)
class Split:
    """A cut graph in two parts.

    Attributes:
        prefix: the nodes that run first, in order.
        crossing: those of them whose values are handed over, in order.
        recomputed: frozen nodes that run again behind the cut, in order.
        rest: all nodes that run behind the cut, these included, in order.
        nbytes: bytes of the values handed over, in the call that was measured.
    """

    prefix: tuple[fx.Node, ...]
    crossing: tuple[fx.Node, ...]
    recomputed: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]
    nbytes: int


def find_split(flow: Dataflow, cut: Cut, metas: Mapping[str, Any]) -> Split:
    """Where to divide a cut graph.

    Args:
        flow, cut: the graph, and what of it is frozen.
        metas: each frozen node's value, by the node's name, on the meta device.

    Raises:
        CannotSplitError: nothing frozen can run ahead, or it would compute something else.
    """
    graph = flow.graph
    ahead = _may_run_ahead(graph, flow, frozenset(cut.in_eval))
    _check_writes(graph, flow, ahead, frozenset(cut.frozen))
    read = _read_behind(graph, ahead)
    if not read:
        raise CannotSplitError("nothing that is frozen is read by the rest")
    crossing = _minimum_cut(graph, flow, ahead, read, metas)
    crossing -= _known_behind(crossing, flow)
    recomputed = _upstream(read - crossing, stop=crossing, within=ahead)
    prefix = _with_writers(crossing, flow, ahead)
    if not any(flow.computes(node) and flow.parameters(node) for node in prefix):
        raise CannotSplitError("the frozen prefix holds no parameters")
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]
    return Split(
        prefix=tuple(node for node in nodes if node in prefix),
        crossing=tuple(node for node in nodes if node in crossing),
        recomputed=tuple(node for node in nodes if node in recomputed),
        rest=tuple(node for node in nodes if node not in ahead or node in recomputed),
        nbytes=sum(_nbytes(metas.get(node.name)) for node in crossing),
    )


def find_stretch(flow: Dataflow, earlier: Split, later: Split) -> tuple[fx.Node, ...]:
    """What of ``later.prefix`` to run on the values that cross in ``earlier``, in order.

    Raises:
        CannotSplitError: ``earlier`` does not lie before ``later``.
    """
    done, within = frozenset(earlier.prefix), frozenset(later.prefix)
    stretch = _with_writers(
        later.crossing, flow, within, stop=frozenset(earlier.crossing), writers=within - done
    )
    if not done <= within or stretch & done & _run_once(flow, within):
        raise CannotSplitError("the cut has not moved forward")
    return tuple(node for node in later.prefix if node in stretch)


def _may_run_ahead(graph: fx.Graph, flow: Dataflow, in_eval: frozenset[str]) -> Nodes:
    """Frozen nodes, and sizes that these need, that depend on the call's tensors alone."""
    ahead: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name not in in_eval and node not in flow.metadata:
            continue
        if draws_random_numbers(node):
            continue
        if all(i in ahead or i.op in ("placeholder", "get_attr") for i in node.all_input_nodes):
            ahead.add(node)
    return frozenset(ahead)


def _check_writes(graph: fx.Graph, flow: Dataflow, ahead: Nodes, frozen: frozenset[str]) -> None:
    """Refuse where the order of a write and a read would change.

    Reads that follow a write by a node that trains are no concern: they train as well.
    """
    given = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    read = {s for node in ahead for i in node.all_input_nodes for s in flow.storages[i]}
    for node in graph.nodes:
        written = flow.stores_to(node)
        if node in ahead and written & given:
            raise CannotSplitError(f"{node.name} writes to what the model was given")
        if node not in ahead and node.name in frozen and written & read:
            raise CannotSplitError(f"{node.name} writes to what the frozen prefix reads")


def _read_behind(graph: fx.Graph, ahead: Nodes) -> Nodes:
    """Nodes that run ahead and are read by one that does not."""
    return frozenset(
        i for node in graph.nodes if node not in ahead for i in node.all_input_nodes if i in ahead
    )


def _known_behind(crossing: Nodes, flow: Dataflow) -> Nodes:
    """Sizes in ``crossing`` of values that are handed over themselves."""

    def measured(node: fx.Node) -> set[fx.Node]:
        inputs = node.all_input_nodes
        return set().union(*(measured(i) if i in flow.metadata else {i} for i in inputs))

    return frozenset(n for n in crossing & flow.metadata if measured(n) <= crossing)


def _upstream(nodes: Iterable[fx.Node], *, stop: Nodes, within: Nodes) -> Nodes:
    """``nodes`` and all before them in ``within``, not beyond ``stop``."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in within and node not in found and node not in stop:
            found.add(node)
            pending += node.all_input_nodes
    return frozenset(found)


def _with_writers(
    nodes: Iterable[fx.Node],
    flow: Dataflow,
    within: Nodes,
    *,
    stop: Nodes = frozenset(),
    writers: Nodes | None = None,
) -> Nodes:
    """``nodes`` and all before them, and what writes in place to these, likewise."""
    found = _upstream(nodes, stop=stop, within=within)
    while True:
        storages = {s for node in found for s in flow.storages[node]}
        writing = {
            node
            for node in (within if writers is None else writers) - found
            if any(not storages.isdisjoint(flow.storages[w]) for w in flow.written_by(node))
        }
        if not writing:
            return found
        found |= _upstream(writing, stop=stop, within=within)


def _minimum_cut(
    graph: fx.Graph, flow: Dataflow, ahead: Nodes, read: Nodes, metas: Mapping[str, Any]
) -> Nodes:
    """The nodes of fewest bytes between those that must not run again and ``read``.

    Each node is an edge of its bytes' capacity. Among cuts of as many bytes the one nearest the
    rest is taken, which leaves the least to run again.
    """
    import networkx as nx

    order = {node: i for i, node in enumerate(graph.nodes)}
    once = _run_once(flow, ahead)
    region = _upstream(read, stop=once, within=ahead)
    region |= {i for node in region for i in node.all_input_nodes if i in once} | (read & once)
    changed = _changed_later(flow, ahead - (region - once), region, order)
    network = nx.DiGraph()
    for node in region:
        ties = len(order) - order[node]
        capacity = _nbytes(metas.get(node.name)) * (len(order) + 1) ** 2 + ties
        limit = {} if node in changed else {"capacity": capacity}
        network.add_edge((node, "in"), (node, "out"), **limit)
        if node in once:
            network.add_edge("before", (node, "in"))
        if node in read:
            network.add_edge((node, "out"), "rest")
        for user in region & node.users.keys() - once:
            network.add_edge((node, "out"), (user, "in"))
    if "before" not in network:
        raise CannotSplitError("nothing in the frozen prefix is worth keeping")
    try:
        _, (before, _) = nx.minimum_cut(network, "before", "rest")
    except nx.NetworkXUnbounded as error:
        raise CannotSplitError("a frozen value is written to in place after it is read") from error
    return frozenset(n for n in region if (n, "in") in before and (n, "out") not in before)


def _changed_later(
    flow: Dataflow, first: Nodes, region: Nodes, order: Mapping[fx.Node, int]
) -> Nodes:
    """Nodes of ``region`` with a reader outside ``first`` that must not see a later write in it."""
    last: dict[fx.Node, int] = {}
    for node in first:
        for storage in flow.stores_to(node):
            last[storage] = max(last.get(storage, -1), order[node])
    return frozenset(
        node
        for node in region
        for user in node.users
        if user not in first
        and any(order[user] < last.get(storage, -1) for storage in flow.storages[node])
    )


def _run_once(flow: Dataflow, ahead: Nodes) -> Nodes:
    """Those of the nodes that run ahead that must not run again, or would miss a write if so."""
    written = {storage for node in ahead for storage in flow.stores_to(node)}
    return frozenset(
        node
        for node in ahead
        if not _may_run_again(node, flow) or not written.isdisjoint(flow.storages[node])
    )


def _may_run_again(node: fx.Node, flow: Dataflow) -> bool:
    """Whether a node costs little more than reading and writing its values, and writes no other."""
    if node in flow.metadata:
        return True
    if flow.written_by(node):
        return False
    if node.op == "call_module":
        module = flow.module(node)
        return type(module).__module__ in _CHEAP_FILES and not isinstance(
            module, nn.MultiheadAttention
        )
    name = called_name(node)
    return name in _CHEAP_NAMES or _is_pointwise(ATEN_NAMES.get(name, name))


@cache
def _is_pointwise(name: str) -> bool:
    """Whether ATen's operator of this name, where there is one, works element by element."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, o) for o in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a function or method draws even in eval mode."""
    name = called_name(node)
    packet = None if node.op == "call_module" else getattr(torch.ops.aten, name, None)
    if packet is None or "dropout" in name or name in ("rrelu", "scaled_dot_product_attention"):
        return False
    return any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    return sum(t.numel() * t.element_size() for t in tensors_in(value))
