"""A trace and a cut, made into functions again: one of the whole graph, or one for each part.

Nodes keep their order: writes in place, random numbers and buffers depend on it. Each run of
frozen nodes is put between two changes of grad mode, and what leaves it is detached.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from fastfreeze.trim.state import call_in_eval, requires_grad, tensors_in
from fastfreeze.graph.cut import Cut, Dataflow, declares_writes
from fastfreeze.graph.split import Split
from fastfreeze.graph.trace import Trace

_EVAL_ARGUMENTS: dict[str, Any] = {
    "training": False,
    "train": False,
    "use_input_stats": False,
    "dropout_p": 0.0,
}

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Program:
    """A rewritten model.

    Attributes:
        function: takes the model, then the tensors of a call and the values of an earlier part.
        escaped: what the cut did not know of, in words: a value that crossed it though it requires
            grad, a write in place. Only a program that leaves autograd on sees them.
        values: values of the latest run, by the node's name, that it was to show; likewise.
    """

    function: Callable[..., Any]
    escaped: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, tensors: Iterable[Any]) -> Any:
        """The function's value; the grad mode is as it was, whatever happens."""
        grad_enabled = torch.is_grad_enabled()
        try:
            return self.function(model, *tensors)
        finally:
            torch.set_grad_enabled(grad_enabled)


def write_program(trace: Trace, cut: Cut, *, detach: bool) -> Program:
    """The traced model with the nodes of ``cut.in_eval`` in eval mode.

    With ``detach``, frozen nodes run under no_grad and what they hand on is detached. Without,
    autograd stays on everywhere; the gradients are the same but for those of the inputs.
    """
    program = Program(_unwritten)
    writer = _Writer(cut, None if detach else _Reports(program))
    for node in trace.graph.nodes:
        writer.write(node)
    return replace(program, function=compiled(writer.graph))


def write_measured(trace: Trace) -> Program:
    """The traced model as it is; ``values`` are those of all nodes, on the meta device."""
    program = Program(_unwritten)
    reports = _Reports(program)
    writer = _Writer(Cut("fx"), reports)
    for node in trace.graph.nodes:
        writer.write(node)
        if node.op not in ("get_attr", "output"):
            writer.pass_through(node, reports.measured)
    return replace(program, function=compiled(writer.graph))


def write_proof(trace: Trace, cut: Cut, kept: Iterable[fx.Node]) -> Program:
    """As much of the traced model, with autograd on, as shows what the cut does not know of.

    Its ``values`` are those of ``kept``.
    """
    program = Program(_unwritten)
    reports = _Reports(program)
    writer = _Writer(cut, reports)
    kept, nodes = frozenset(kept), list(trace.graph.nodes)
    seen = {*cut.frozen, *cut.readers}
    last = max((i for i, node in enumerate(nodes) if node.name in seen), default=-1)
    for node in nodes[: last + 1]:
        writer.write(node)
        if node in kept:
            writer.pass_through(node, reports.kept)
    writer.end()
    return replace(program, function=compiled(writer.graph))


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


def write_piece(piece: Piece) -> Program:
    """A piece as it is, as a function to the tuple of its results.

    It takes the tensors of a call, then the values given, and is to be called under no_grad.
    """
    graph = fx.Graph()
    copies = placeholders(graph, piece.flow.graph, piece.given)
    for node in piece.nodes:
        copies[node] = eval_copy(graph, node, copies.__getitem__)
    hand_over(graph, {node: copies[node] for node in piece.results})
    return Program(compiled(graph))


def write_suffix(traced: fx.Graph, cut: Cut, split: Split) -> Program:
    """The rest, as a function of the call's tensors and the values that cross."""
    writer = _Writer(cut, None)
    writer.start(placeholders(writer.graph, traced, split.crossing), split.crossing)
    for node in split.rest:
        writer.write(node)
    return Program(compiled(writer.graph))


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


def _unwritten(*_: Any) -> Any:
    raise AssertionError("a program that is still being written")


class _Reports:
    """What a program with autograd left on looks at, and the cut was not able to."""

    def __init__(self, program: Program) -> None:
        self._escaped, self._values = program.escaped, program.values

    def measured(self, value: Any, name: str) -> Any:
        self._values[name] = tree_map(
            lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, value
        )
        return value

    def kept(self, value: Any, name: str) -> Any:
        self._values[name] = _detached(value, name)
        return value

    def crossing(self, value: Any, name: str) -> Any:
        if requires_grad(value):
            self._escaped.append(
                f"{name} requires grad, though no parameter known to lead there does"
            )
        return value

    def call(self, target: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in tensors_in((args, kwargs)) if not t.is_inference()]
        versions = [t._version for t in given]
        output = target(*args, **kwargs)
        if [t._version for t in given] != versions and not declares_writes(target):
            self._escaped.append(f"{name} writes to its input, though it does not say inplace")
        return output


class _Writer:
    """Copies a graph node by node; with ``reports``, autograd stays on."""

    def __init__(self, cut: Cut, reports: _Reports | None) -> None:
        self.graph = fx.Graph()
        self._reports = reports
        self._frozen, self._in_eval = frozenset(cut.frozen), frozenset(cut.in_eval)
        self._boundary, self._readers = frozenset(cut.boundary), frozenset(cut.readers)
        self._copies: dict[fx.Node, fx.Node] = {}
        self._crossed: dict[fx.Node, fx.Node] = {}
        self._to_cross: list[fx.Node] = []
        self._grad_enabled: fx.Node | None = None
        self._inside = False

    def start(self, copies: dict[fx.Node, fx.Node], crossed: Iterable[fx.Node]) -> None:
        """Begin with what is there already; ``crossed`` of it comes from the prefix."""
        self._copies |= copies
        self._crossed |= {node: copies[node] for node in crossed}

    def write(self, node: fx.Node) -> None:
        if node.name in self._frozen:
            self._enter()
        elif node.op not in ("placeholder", "get_attr"):
            self._leave()
        if node.name in self._in_eval:
            copy = eval_copy(self.graph, node, self._now)
        elif node.name in self._readers and self._reports:
            module = self.graph.create_node("get_attr", node.target)
            args, kwargs = mapped_arguments(node, self._now)
            copy = self.graph.call_function(self._reports.call, (module, node.name, *args), kwargs)
        else:
            copy = self.graph.node_copy(node, self._now)
            copy.type = None
        self._copies[node] = copy
        if node.name in self._boundary:
            self._to_cross.append(node)

    def pass_through(self, node: fx.Node, report: Callable[[Any, str], Any]) -> None:
        """Have the value of a node that has been written reported."""
        self._copies[node] = self.graph.call_function(report, (self._copies[node], node.name))

    def end(self) -> None:
        """End the graph where it is, with no value."""
        self._leave()
        self.graph.output(None)

    def _now(self, node: fx.Node) -> fx.Node:
        """The copy of a node that the node being written shall read."""
        if self._inside:
            return self._copies[node]
        return self._crossed.get(node, self._copies[node])

    def _enter(self) -> None:
        if self._inside:
            return
        self._inside = True
        if not self._reports:
            if self._grad_enabled is None:
                self._grad_enabled = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(torch.set_grad_enabled, (False,))

    def _leave(self) -> None:
        if not self._inside:
            return
        self._inside = False
        if not self._reports:
            self.graph.call_function(torch.set_grad_enabled, (self._grad_enabled,))
        cross = self._reports.crossing if self._reports else _detached
        for node in self._to_cross:
            self._crossed[node] = self.graph.call_function(cross, (self._copies[node], node.name))
        self._to_cross = []


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
