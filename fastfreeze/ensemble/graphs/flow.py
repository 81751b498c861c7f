"""A graph as a function, and what a run of it shows: which memory nodes give and write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastfreeze.ensemble.graphs.trace import NoGraphError, generator_states, refused
from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import tensors_in

# Whether these return their input's memory depends on its strides and the batch size.
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


class Flow(fx.Interpreter):
    """A graph, and what a run of it shows; the run leaves the model as it was.

    Attributes:
        graph: of the operations of ``module``.
        forms: the shape and dtype of each node whose value is a tensor.
        storages: of the tensors in each node's value.
        writes: the storages that each node has written to.
        random: the nodes that have drawn random numbers.

    Raises:
        NoGraphError: the graph cannot run, or writes to its inputs or to tensors of the model.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module, *inputs: Any) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.forms: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}
        self.storages: dict[fx.Node, Storages] = {}
        self.writes: dict[fx.Node, Storages] = {}
        self.random: set[fx.Node] = set()
        self._generators = generator_states()
        with preserved(model), torch.inference_mode(False), torch.no_grad(), refused():
            inputs = tuple(v.clone() if isinstance(v, Tensor) else v for v in inputs)
            fixed = list(tensors_in((inputs, [vars(m) for m in model.modules()])))
            before = _versions(fixed)
            self.run(*inputs)
            if _versions(fixed) != before:
                raise NoGraphError("the model writes to its inputs or to its own tensors in place")

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and note what it does."""
        given = list(tensors_in(self.fetch_args_kwargs_from_env(n)))
        versions = _versions(given)
        value = super().run_node(n)
        before, self._generators = self._generators, generator_states()
        if self._generators != before:
            self.random.add(n)
        if isinstance(value, Tensor):
            self.forms[n] = value.shape, value.dtype
        pairs = zip(given, versions, strict=True)
        self.writes[n] = _storages([t for t, version in pairs if t._version != version])
        may_share = getattr(n.target, "__name__", n.target) in _MAY_SHARE
        self.storages[n] = _storages([value, given] if may_share else value)
        return value


def _versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _storages(value: Any) -> Storages:
    # Weak references: no other storage gets the place of one that is gone.
    return frozenset(StorageWeakRef(t.untyped_storage()) for t in tensors_in(value))
