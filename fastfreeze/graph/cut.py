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

from fastfreeze.trim.state import requires_grad
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
# What these give, or if they work, depends on how their input lies in memory.
_MIND_LAYOUT = frozenset(
    (
        *("view", "view_as", "as_strided", "as_strided_", "as_strided_scatter"),
        *("stride", "is_contiguous", "storage_offset", "data_ptr"),
    )
)
# What ATen calls Python's operators, where it has another name.
ATEN_NAMES = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
_GIVE_ONE_TENSOR = (
    *(nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.Embedding),
    *(nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.Dropout),
)

Nodes = frozenset[fx.Node]
Names = dict[fx.Node, Nodes]


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
        readers: names of the nodes that call a module on something from before the cut, and train.
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
    readers: tuple[str, ...] = ()
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
    graph = Dataflow(trace.graph, model)
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
        readers=tuple(
            node.name
            for node in computing
            if node in tainted
            and node.op == "call_module"
            and any(not graph.storages[i] <= tainted for i in node.all_input_nodes)
        ),
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


class Dataflow:
    """What a graph's nodes hold, may alias and may write to.

    Attributes:
        graph, model: what it is of.
        held: tensors that a node is a reference to or, for a module, owns.
        metadata: nodes that give no tensor but sizes, dtypes and numbers made of these. They carry
            no taint.
        storages: the nodes in whose outputs' storage a node's output may lie.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.model = model
        self._modules: dict[str, nn.Module] = {}
        self.metadata: set[fx.Node] = set()
        self.held: dict[fx.Node, list[Tensor]] = {}
        self.storages: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if _is_metadata(node, self.metadata):
                self.metadata.add(node)
            self.held[node] = self._tensors_of(node)
            if node.op in ("placeholder", "get_attr") or self._is_fresh(node):
                self.storages[node] = frozenset((node,))
            elif self._returns_first(node):
                self.storages[node] = self.storages[node.args[0]]
            else:
                self.storages[node] = frozenset().union(
                    *(self.storages[i] for i in self.inputs(node))
                )

    def computes(self, node: fx.Node) -> bool:
        return node.op.startswith("call_") and node not in self.metadata

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        name = str(node.target)
        if name not in self._modules:
            self._modules[name] = self.model.get_submodule(name)
        return self._modules[name]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values ``node`` computes with; none for metadata."""
        return [] if node in self.metadata else node.all_input_nodes

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

        A storage that a tainted node writes to must have come across the cut by one name, or
        autograd could not see how others are related to it. Where it has not, all names but the
        storage's own are tainted from the start, and the search starts again.
        """
        owned: set[fx.Node] = set()
        while True:
            tainted, conflicts = self._spread(owned)
            if not conflicts:
                return tainted
            owned |= conflicts

    def _spread(self, owned: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """Tainted nodes; and storages that are written to and came across by several names.

        Args:
            owned: storages that are to come across by their own name.
        """
        tainted: set[fx.Node] = set()
        crossings: dict[fx.Node, Names] = {}
        written: Names = {}
        conflicts: set[fx.Node] = set()
        for node in self.graph.nodes:
            inputs = self.inputs(node)
            reads = False
            for name in inputs:
                for storage in self.storages[name] & written.keys():
                    reads = True
                    if len(written[storage] | _crossed_by(name, storage, crossings)) > 1:
                        conflicts.add(storage)
            if not (
                reads
                or (self.storages[node] & owned) - {node}
                or not tainted.isdisjoint(inputs)
                or requires_grad(self.held[node])
            ):
                continue
            tainted.add(node)
            crossings[node] = {
                storage: frozenset().union(
                    *(
                        _crossed_by(name, storage, crossings)
                        for name in inputs
                        if storage in self.storages[name]
                    )
                )
                or frozenset((node,))
                for storage in self.storages[node]
            }
            for name in self.written_by(node):
                for storage in self.storages[name]:
                    by = _crossed_by(name, storage, crossings)
                    written[storage] = written.get(storage, frozenset()) | by
        return tainted, conflicts

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """Inputs that a node may write to in place."""
        inputs = self.inputs(node)
        if node.op == "call_module":
            return inputs if declares_writes(self.module(node)) else []
        out = node.kwargs.get("out")
        written = [out] if isinstance(out, fx.Node) else []
        return written + (inputs[:1] if _writes_first(node) else [])

    def stores_to(self, node: fx.Node) -> Nodes:
        """Storages that a node may write to."""
        return frozenset().union(*(self.storages[name] for name in self.written_by(node)))

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a node's output surely shares no memory with its inputs."""
        if node.op == "call_module":
            module = self.module(node)
            return type(module).__module__.startswith("torch.nn.modules") and bool(self.held[node])
        return (
            node.op in ("call_function", "call_method")
            and not _writes_first(node)
            and "out" not in node.kwargs
            and _is_torchs(node.target)
            and _gives_fresh(called_name(node))
        )

    def _returns_first(self, node: fx.Node) -> bool:
        """Whether a node's output is surely its first argument, a tensor that it writes to."""
        first = node.args[0] if node.args else None
        if node.op not in ("call_function", "call_method") or not isinstance(first, fx.Node):
            return False
        known = node.target in IN_PLACE_FUNCTIONS or _is_torchs(node.target)
        return known and _writes_first(node) and self._is_one_tensor(first)

    def _is_one_tensor(self, node: fx.Node) -> bool:
        """Whether a node's output is surely a tensor, not several, nor a number."""
        if node.op == "call_module":
            return isinstance(self.module(node), _GIVE_ONE_TENSOR)
        if self._returns_first(node):
            return True
        # Not Python's own operators, which work on tuples and numbers too.
        if getattr(node.target, "__module__", None) in ("_operator", "builtins"):
            return False
        of_torch = node.op in ("call_function", "call_method") and _is_torchs(node.target)
        return of_torch and _gives_one_tensor(called_name(node))

    def _tensors_of(self, node: fx.Node) -> list[Tensor]:
        if node.op not in ("call_module", "get_attr"):
            return []
        value = attribute(self.model, str(node.target))
        if isinstance(value, nn.Module):
            return [*value.parameters(), *value.buffers()]
        return [value] if isinstance(value, Tensor) else []


def _crossed_by(name: fx.Node, storage: fx.Node, crossings: dict[fx.Node, Names]) -> Nodes:
    """The names by which a storage came across the cut, to be read under ``name``."""
    return crossings[name][storage] if name in crossings else frozenset((name,))


def declares_writes(module: Any) -> bool:
    """Whether something in a module says that it writes to its input."""
    return any(getattr(m, "inplace", False) for m in module.modules())


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


def _is_torchs(target: Any) -> bool:
    """Whether a function or method is torch's or a Python operator."""
    module = getattr(target, "__module__", None) or "torch"
    return module.split(".")[0] in ("torch", "_operator", "builtins")


def called_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def minds_layout(node: fx.Node) -> bool:
    """Whether what a function or method gives, or if it works, depends on its input's strides."""
    return node.op in ("call_function", "call_method") and called_name(node) in _MIND_LAYOUT


def _writes_first(node: fx.Node) -> bool:
    """Whether a function or method writes to its first argument."""
    name = called_name(node)
    operators = getattr(node.target, "__module__", "") == "_operator"  # and_, or_
    return (
        node.target in IN_PLACE_FUNCTIONS
        or (name.endswith("_") and not name.endswith("__") and not operators)
        or node.kwargs.get("inplace") not in (None, False)
    )


@cache
def _gives_one_tensor(name: str) -> bool:
    """Whether ATen's operator of this name, where there is one, always returns one tensor."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    returns = [getattr(packet, overload)._schema.returns for overload in packet.overloads()]
    return all(len(r) == 1 and str(r[0].type) == "Tensor" for r in returns)


@cache
def _gives_fresh(name: str) -> bool:
    """Whether ATen's operator of this name, where there is one, never returns an alias."""
    packet = getattr(torch.ops.aten, ATEN_NAMES.get(name, name), None)
    if packet is None or name in _RETURN_INPUT:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    pure = [s for s in schemas if not any(a.is_write for a in s.arguments)]
    return bool(pure) and all(r.alias_info is None for s in pure for r in s.returns)
