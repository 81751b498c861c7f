"""A trace and a cut, made into a function again.

Nodes keep their order: writes in place, random numbers and buffers depend on it. Each run of
frozen nodes is put between two changes of grad mode, and what leaves it is detached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from fastfreeze.graph._state import call_in_eval, requires_grad, tensors_in
from fastfreeze.graph.cut import Cut, declares_writes
from fastfreeze.graph.trace import Trace

_EVAL_ARGUMENTS: dict[str, Any] = {
    "training": False,
    "train": False,
    "use_input_stats": False,
    "dropout_p": 0.0,
}


@dataclass(frozen=True)
class Program:
    """A rewritten model.

    Attributes:
        escaped: what the cut did not know of, in words: a value that crossed it though it requires
            grad, a write in place. Only a program that leaves autograd on sees them.
    """

    _function: Callable[..., Any]
    escaped: list[str]

    def __call__(self, model: nn.Module, tensors: list[Tensor]) -> Any:
        """The output of ``model`` for the tensors of a call, in order."""
        grad_enabled = torch.is_grad_enabled()
        try:
            return self._function(model, *tensors)
        finally:
            torch.set_grad_enabled(grad_enabled)


def write_program(trace: Trace, cut: Cut, *, detach: bool) -> Program:
    """The traced model with the nodes of ``cut.in_eval`` in eval mode.

    With ``detach``, frozen nodes run under no_grad and what they hand on is detached. Without,
    autograd stays on everywhere; the gradients are the same but for those of the inputs.
    """
    escaped: list[str] = []
    writer = _Writer(cut, None if detach else _Reports(escaped))
    for node in trace.graph.nodes:
        writer.write(node)
    code = writer.graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fastfreeze program>", "exec"), namespace)
    return Program(namespace["forward"], escaped)


class _Reports:
    """What a program with autograd left on looks at, and the cut was not able to."""

    def __init__(self, escaped: list[str]) -> None:
        self._escaped = escaped

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

    def write(self, node: fx.Node) -> None:
        if node.name in self._frozen:
            self._enter()
        elif node.op not in ("placeholder", "get_attr"):
            self._leave()
        if node.name in self._in_eval and node.op in ("call_module", "call_function"):
            copy = self._in_eval_mode(node)
        elif node.name in self._readers and self._reports:
            module = self.graph.create_node("get_attr", node.target)
            args, kwargs = self._arguments(node)
            copy = self.graph.call_function(self._reports.call, (module, node.name, *args), kwargs)
        else:
            copy = self.graph.node_copy(node, self._now)
            copy.type = None
        self._copies[node] = copy
        if node.name in self._boundary:
            self._to_cross.append(node)

    def _now(self, node: fx.Node) -> fx.Node:
        """The copy of a node that the node being written shall read."""
        if self._inside:
            return self._copies[node]
        return self._crossed.get(node, self._copies[node])

    def _arguments(self, node: fx.Node) -> Any:
        return map_aggregate(
            (node.args, node.kwargs), lambda a: self._now(a) if isinstance(a, fx.Node) else a
        )

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

    def _in_eval_mode(self, node: fx.Node) -> fx.Node:
        args, kwargs = self._arguments(node)
        if callable(node.target):
            args, kwargs = eval_arguments(node.target, args, kwargs)
            return self.graph.create_node("call_function", node.target, args, kwargs, node.name)
        module = self.graph.create_node("get_attr", node.target)
        return self.graph.call_function(_call_module_in_eval, (module, *args), kwargs)


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
