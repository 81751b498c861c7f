"""Where the frozen prefix ends: forward taint from whatever requires grad, on the graph.

A node is tainted if it holds something that requires grad, or reads a tainted value, or reads
storage that a tainted node has written to in place. The rest is the frozen prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fastfreeze.graph._state import requires_grad
from fastfreeze.graph.trace import IN_PLACE_FUNCTIONS, Trace

_METADATA_ATTRIBUTES = frozenset(
    ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "itemsize", "nbytes")
)
_METADATA_METHODS = frozenset(
    (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size"),
        *("get_device", "is_floating_point", "is_complex", "is_contiguous"),
    )
)
# Their schemas do not say that they may return their input, or a view of it.
_RETURN_INPUT = frozenset(
    (
        *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
        *("type_as", "einsum", "broadcast_tensors", "meshgrid"),
    )
)
_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}


@dataclass(frozen=True)
class Cut:
    """What is frozen, and what crosses to the rest.

    Attributes:
        mode: "fx" if the cut lies in the model's graph; "module" if there is none, and frozen
            modules are found as they are called.
        reason: why the mode is "module"; empty in mode "fx".
        frozen: names of the graph's nodes in the frozen prefix; empty in mode "module".
        in_eval: those of them that run in eval mode: all that hold a frozen parameter, or come
            before or after one that does.
        boundary: names of the frozen nodes whose values the rest or the output reads.
        modules: names of the modules, called as they are, all of whose parameters are frozen. They
            run in eval mode if no input requires grad. In mode "fx" those inside a module that
            is one node and also trains. The model's own name is "".
        num_nodes: nodes of the graph that compute; 0 in mode "module".
        frozen_parameters: number of parameters, as tensors, that ``frozen`` and ``modules`` hold.
    """

    mode: Literal["fx", "module"]
    reason: str = ""
    frozen: tuple[str, ...] = ()
    in_eval: tuple[str, ...] = ()
    boundary: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    num_nodes: int = 0
    frozen_parameters: int = 0

    def __str__(self) -> str:
        held = f"{self.frozen_parameters} parameters"
        modules = ", ".join(name or "the model" for name in self.modules)
        if self.mode == "module":
            return f"module-level cut ({self.reason}); frozen, {held}: {modules or 'nothing'}"
        if not (self.frozen or self.modules):
            return f"nothing frozen before the first of {self.num_nodes} nodes that trains"
        text = f"{len(self.frozen)} of {self.num_nodes} nodes frozen, {held}"
        if self.boundary:
            text += "; crossing: " + ", ".join(self.boundary)
        return text + (f"; frozen inside modules: {modules}" if modules else "")


def find_cut(trace: Trace, model: nn.Module) -> Cut:
    """The cut for the present ``requires_grad`` flags of ``model``."""
    graph = _Dataflow(trace.graph, model)
    tainted = graph.tainted()
    computing = [node for node in trace.graph.nodes if graph.computes(node)]
    frozen = [node for node in computing if node not in tainted]
    in_eval = graph.joined_to_parameters(frozen)
    if not in_eval:
        frozen = []
    kept = {*frozen, *graph.metadata}
    inside = dict(
        found
        for node in computing
        if node in tainted and node.op == "call_module" and requires_grad(graph.held[node])
        for found in frozen_modules(model.get_submodule(node.target), node.target)
    )
    parameters = {id(p) for node in frozen for p in graph.parameters(node)}
    parameters.update(id(p) for module in inside.values() for p in module.parameters())
    return Cut(
        mode="fx",
        frozen=tuple(node.name for node in frozen),
        in_eval=tuple(node.name for node in frozen if node in in_eval),
        boundary=tuple(node.name for node in frozen if not kept.issuperset(node.users)),
        modules=tuple(inside),
        num_nodes=len(computing),
        frozen_parameters=len(parameters),
    )


def find_module_cut(model: nn.Module, reason: str) -> Cut:
    """The cut of a model without a graph, for the present ``requires_grad`` flags."""
    modules = dict(frozen_modules(model))
    parameters = {id(p) for module in modules.values() for p in module.parameters()}
    return Cut("module", reason, modules=tuple(modules), frozen_parameters=len(parameters))


def frozen_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules, ``module`` included, with parameters none of which requires grad.

    Containers that are not called themselves, such as ``nn.ModuleList``, are looked into.
    """
    parameters = list(module.parameters())
    if not parameters:
        return
    if type(module).forward is not nn.Module.forward and not requires_grad(parameters):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from frozen_modules(child, f"{name}.{child_name}".lstrip("."))


class _Dataflow:
    """What a graph's nodes hold, may alias and may write to.

    Attributes:
        held: tensors that a node is a reference to or, for a module, owns.
        metadata: nodes that give no tensor but sizes, dtypes and numbers made of these. They carry
            no taint.
        storages: the nodes in whose outputs' storage a node's output may lie.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self._graph = graph
        self._model = model
        self.metadata: set[fx.Node] = set()
        self.held: dict[fx.Node, list[Tensor]] = {}
        self.storages: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if _is_metadata(node, self.metadata):
                self.metadata.add(node)
            self.held[node] = self._tensors_of(node)
            if node.op in ("placeholder", "get_attr") or self._is_fresh(node):
                self.storages[node] = frozenset((node,))
            else:
                self.storages[node] = frozenset().union(
                    *(self.storages[i] for i in self.inputs(node))
                )

    def computes(self, node: fx.Node) -> bool:
        return node.op.startswith("call_") and node not in self.metadata

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values ``node`` computes with; none for metadata."""
        if node in self.metadata:
            return []
        return [i for i in node.all_input_nodes if i not in self.metadata]

    def parameters(self, node: fx.Node) -> list[Tensor]:
        """The parameters that a node computes with."""
        held = [
            t
            for i in (node, *self.inputs(node))
            if i is node or i.op == "get_attr"
            for t in self.held[i]
        ]
        return [t for t in held if isinstance(t, nn.Parameter)]

    def joined_to_parameters(self, frozen: list[fx.Node]) -> set[fx.Node]:
        """Those of ``frozen`` that hold a parameter, or lie before or after such a node in it."""
        behind = {node for node in frozen if self.parameters(node)}
        before = set(behind)
        for node in frozen:
            if not behind.isdisjoint(self.inputs(node)):
                behind.add(node)
        for node in reversed(frozen):
            if not before.isdisjoint(node.users):
                before.add(node)
        return (behind | before).intersection(frozen)

    def tainted(self) -> set[fx.Node]:
        """All nodes that are not frozen.

        Where storage is written to by a tainted node and then read under another name than it was
        written under, autograd has to see how the two names are related: the names other than
        the storage's own are then tainted as well, and the search starts again.
        """
        retraced: set[fx.Node] = set()
        while True:
            tainted, conflicts = self._spread(retraced)
            if conflicts <= retraced:
                return tainted
            retraced |= conflicts

    def _spread(self, retraced: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """Tainted nodes, and storages read under another name than a tainted node wrote under.

        The names of storages in ``retraced``, other than their own, are tainted from the start.
        """
        tainted: set[fx.Node] = set()
        written: dict[fx.Node, fx.Node] = {}
        conflicts: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node in self.metadata:
                continue
            inputs = self.inputs(node)
            names = self.storages[node] & retraced
            reads = [(s, i) for i in inputs for s in self.storages[i] if s in written]
            for storage, name in reads:
                if name in tainted or written[storage] is name:
                    continue
                if not (storage is name and storage in retraced):
                    conflicts.add(storage)
            if (
                reads
                or names - {node}
                or not tainted.isdisjoint(inputs)
                or requires_grad(self.held[node])
            ):
                tainted.add(node)
                for name in self._written_by(node):
                    written.update((storage, name) for storage in self.storages[name])
        return tainted, conflicts

    def _written_by(self, node: fx.Node) -> list[fx.Node]:
        """Inputs that a node may write to in place."""
        inputs = self.inputs(node)
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            return inputs if any(getattr(m, "inplace", False) for m in module.modules()) else []
        out = node.kwargs.get("out")
        written = [out] if isinstance(out, fx.Node) else []
        return written + (inputs[:1] if _writes_first(node) else [])

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a node's output surely shares no memory with its inputs."""
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            return type(module).__module__.startswith("torch.nn.modules") and bool(self.held[node])
        return (
            node.op in ("call_function", "call_method")
            and not _writes_first(node)
            and "out" not in node.kwargs
            and _gives_fresh(_target_name(node))
        )

    def _tensors_of(self, node: fx.Node) -> list[Tensor]:
        if node.op not in ("call_module", "get_attr"):
            return []
        value = attribute(self._model, str(node.target))
        if isinstance(value, nn.Module):
            return [*value.parameters(), *value.buffers()]
        return [value] if isinstance(value, Tensor) else []


def attribute(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return reduce(getattr, path.split("."), model)


def _is_metadata(node: fx.Node, metadata: set[fx.Node]) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _METADATA_ATTRIBUTES
    module = getattr(node.target, "__module__", "")
    inputs = node.all_input_nodes
    return module in ("_operator", "builtins") and bool(inputs) and metadata.issuperset(inputs)


def _target_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _writes_first(node: fx.Node) -> bool:
    """Whether a function or method writes to its first argument."""
    name = _target_name(node)
    operators = getattr(node.target, "__module__", "") == "_operator"  # and_, or_
    return (
        node.target in IN_PLACE_FUNCTIONS
        or (name.endswith("_") and not name.endswith("__") and not operators)
        or node.kwargs.get("inplace") not in (None, False)
    )


@cache
def _gives_fresh(name: str) -> bool:
    """Whether ATen's operator of this name, where there is one, never returns an alias."""
    packet = getattr(torch.ops.aten, _OPERATORS.get(name, name), None)
    if packet is None or name in _RETURN_INPUT:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    pure = [s for s in schemas if not any(a.is_write for a in s.arguments)]
    return bool(pure) and all(r.alias_info is None for s in pure for r in s.returns)
