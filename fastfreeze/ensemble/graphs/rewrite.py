"""Nodes of a trace, made into functions again."""

from __future__ import annotations

import inspect
import itertools
import linecache
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from fastfreeze.ensemble.graphs.dataflow import Dataflow
from fastfreeze.ensemble.graphs.held import call_in_eval
from fastfreeze.ensemble.graphs.trace import Trace

_EVAL_ARGUMENTS: dict[str, Any] = {
    "training": False,
    "train": False,
    "use_input_stats": False,
    "dropout_p": 0.0,
}

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Program:
    """Nodes as a function.

    Attributes:
        function: takes the model, then the tensors of a call and the values of an earlier part.
        values: values of the latest run, by the node's name, that it was to show.
    """

    function: Callable[..., Any]
    values: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, tensors: Iterable[Any]) -> Any:
        """The function's value."""
        return self.function(model, *tensors)


def write_measured(trace: Trace) -> Program:
    """The traced model as it is; ``values`` are those of all nodes, on the meta device."""
    values: dict[str, Any] = {}

    def measured(value: Any, name: str) -> Any:
        values[name] = tree_map(
            lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, value
        )
        return value

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].type = None
        if node.op not in ("get_attr", "output"):
            copies[node] = graph.call_function(measured, (copies[node], node.name))
    return Program(compiled(graph), values)


@dataclass(frozen=True)
class Piece:
    """Frozen nodes that run on their own, in eval mode.

    Attributes:
        flow: of the graph.
        nodes: what runs, in order.
        given: nodes whose values are there already.
        results: those of ``nodes`` whose values are wanted.
        metas: each frozen node's value, by the node's name, on the meta device.
    """

    flow: Dataflow
    nodes: Sequence[fx.Node]
    given: Sequence[fx.Node]
    results: Sequence[fx.Node]
    metas: Mapping[str, Any]


def placeholders(
    graph: fx.Graph, traced: fx.Graph, given: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """In ``graph``, places for the call's tensors, for ``given`` values and the model's tensors."""
    own = [node for node in traced.nodes if node.op == "placeholder"]
    copies = {node: graph.placeholder(node.name) for node in [*own, *given]}
    held = [node for node in traced.nodes if node.op == "get_attr"]
    return copies | {node: graph.get_attr(node.target) for node in held}


def hand_over(graph: fx.Graph, results: dict[fx.Node, fx.Node]) -> None:
    """End ``graph`` with the tuple of the copies of ``results``."""
    crossed = [graph.call_function(_detached, (copy, n.name)) for n, copy in results.items()]
    graph.output(tuple(crossed))


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function, whose first argument holds its attributes."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    # torch.compile tells functions apart by their files; those without a source share one limit.
    name = f"<fastfreeze program {next(_NUMBERS)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    exec(compile(code.src, name, "exec"), namespace)
    function = cast(Callable[..., Any], namespace["forward"])
    weakref.finalize(function, linecache.cache.pop, name, None)
    return function


def eval_copy(graph: fx.Graph, node: fx.Node, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of ``node`` in eval mode, last in ``graph``; ``now`` gives those of its inputs."""
    if node.op not in ("call_module", "call_function"):
        copy = graph.node_copy(node, now)
        copy.type = None
        return copy
    args, kwargs = mapped_arguments(node, now)
    if callable(node.target):
        args, kwargs = eval_arguments(node.target, args, kwargs)
        return graph.create_node("call_function", node.target, args, kwargs, node.name)
    module = graph.create_node("get_attr", node.target)
    return graph.call_function(_call_module_in_eval, (module, *args), kwargs)


def mapped_arguments(node: fx.Node, now: Callable[[fx.Node], fx.Node]) -> Any:
    """A node's positional and keyword arguments, its inputs replaced by what ``now`` gives."""
    return map_aggregate(
        (node.args, node.kwargs), lambda a: now(a) if isinstance(a, fx.Node) else a
    )


def eval_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for ``function``, with dropout off and norms on their running statistics."""
    names = _argument_names(function)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "running_mean" in names and given.get("running_mean") is None:
        return args, kwargs  # nothing to use but the batch's own statistics
    args, kwargs = tuple(args), dict(kwargs)
    for name, value in _EVAL_ARGUMENTS.items():
        if name in names[: len(args)]:
            at = names.index(name)
            args = (*args[:at], value, *args[at + 1 :])
        elif name in names:
            kwargs[name] = value
    return args, kwargs


@cache
def _argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        packet = getattr(torch.ops.aten, function.__name__, None)
        if packet is None:
            return ()
        schema = getattr(packet, packet.overloads()[0])._schema
        return tuple(argument.name for argument in schema.arguments)


def _call_module_in_eval(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_in_eval(module, module, *args, **kwargs)


def _detached(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)
