"""A graph as a function, and what a run of it shows: who gives whose memory, and writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastfreeze.ensemble.graphs.trace import NoGraphError, generator_states
from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import tensors_in

# Whether these give memory of what they are given depends on its strides and its batch size.
_MAY_SHARE = ("contiguous", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "to")

Storages = frozenset[StorageWeakRef]
Program = Callable[..., Any]  # of what holds the graph's attributes, then its placeholders


def written(graph: fx.Graph) -> Program:
    """The graph as a Python function, whose first argument holds its attributes."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return cast(Program, namespace["forward"])


def copied(graph: fx.Graph, node: fx.Node, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of ``node``, last in ``graph``; ``now`` gives those of its inputs."""
    copy = graph.node_copy(node, now)
    copy.type = None
    return copy


class Flow:
    """What a run of a graph shows. The run leaves the model as it was.

    Attributes:
        graph, model: what it is of.
        forms: shape and dtype of nodes whose value is a tensor.
        storages: of the tensors in each node's value.
        writes: which storages a node has written to.
        random: nodes that have drawn random numbers.

    Raises:
        NoGraphError: the graph cannot run, or writes to its inputs or to tensors of the model.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module, *inputs: Any) -> None:
        self.graph, self.model = graph, model
        self.forms: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}
        self.storages: dict[fx.Node, Storages] = {}
        self.writes: dict[fx.Node, Storages] = {}
        self.random: set[fx.Node] = set()
        with preserved(model), torch.inference_mode(False), torch.no_grad():
            try:
                inputs = tuple(v.clone() if isinstance(v, Tensor) else v for v in inputs)
                fixed = list(tensors_in((inputs, [vars(m) for m in model.modules()])))
                before = _versions(fixed)
                _Watched(self).run(*inputs)
            except Exception as error:  # of whatever kind: the model itself will tell
                reason = str(error).strip().split("\n")[0]
                raise NoGraphError(f"{type(error).__name__}: {reason}") from error
            if _versions(fixed) != before:
                raise NoGraphError("the model writes to its inputs or to its own tensors in place")

    def computes(self, node: fx.Node) -> bool:
        """Whether a node makes tensors, not only sizes and the like."""
        return node.op.startswith("call_") and bool(self.storages[node])

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.model.get_submodule(str(node.target))


class _Watched(fx.Interpreter):
    """A run of a graph that notes of each node what :class:`Flow` tells."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.model, graph=flow.graph)
        self.extra_traceback = False
        self._flow, self._generators = flow, generator_states()

    def run_node(self, n: fx.Node) -> Any:
        flow, given = self._flow, list(tensors_in(self.fetch_args_kwargs_from_env(n)))
        versions = _versions(given)
        value = super().run_node(n)
        before, self._generators = self._generators, generator_states()
        if self._generators != before:
            flow.random.add(n)
        if isinstance(value, Tensor):
            flow.forms[n] = value.shape, value.dtype
        pairs = zip(given, versions, strict=True)
        flow.writes[n] = _storages([t for t, version in pairs if t._version != version])
        may_share = getattr(n.target, "__name__", n.target) in _MAY_SHARE
        flow.storages[n] = _storages([value, given] if may_share else value)
        return value


def _versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _storages(value: Any) -> Storages:
    # Weak references: no other storage gets the place of one that is gone.
    return frozenset(StorageWeakRef(t.untyped_storage()) for t in tensors_in(value))
