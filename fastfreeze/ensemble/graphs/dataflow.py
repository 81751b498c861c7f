"""What a graph's nodes hold, may alias and may write to."""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastfreeze.ensemble.graphs.trace import IN_PLACE_FUNCTIONS

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
