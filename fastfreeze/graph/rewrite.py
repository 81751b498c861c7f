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

from fastfreeze.graph._state import call_in_eval, requires_grad
from fastfreeze.graph.cut import Cut
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
        escaped: names of values that crossed the cut though they require grad; only a program that
            leaves autograd on sees them.
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

    def report(value: Any, name: str) -> Any:
        if requires_grad(value):
            escaped.append(name)
        return value

    writer = _Writer(cut, _detached if detach else report, switch=detach)
    for node in trace.graph.nodes:
        writer.write(node)
    code = writer.graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fastfreeze program>", "exec"), namespace)
    return Program(namespace["forward"], escaped)


class _Writer:
    """Copies a graph node by node."""

    def __init__(self, cut: Cut, cross: Callable[[Any, str], Any], switch: bool) -> None:
        self.graph = fx.Graph()
        self._cross = cross
        self._switch = switch
        self._frozen, self._in_eval = frozenset(cut.frozen), frozenset(cut.in_eval)
        self._boundary = frozenset(cut.boundary)
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

    def _enter(self) -> None:
        if self._inside:
            return
        self._inside = True
        if self._switch:
            if self._grad_enabled is None:
                self._grad_enabled = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(torch.set_grad_enabled, (False,))

    def _leave(self) -> None:
        if not self._inside:
            return
        self._inside = False
        if self._switch:
            self.graph.call_function(torch.set_grad_enabled, (self._grad_enabled,))
        for node in self._to_cross:
            arguments = (self._copies[node], node.name)
            self._crossed[node] = self.graph.call_function(self._cross, arguments)
        self._to_cross = []

    def _in_eval_mode(self, node: fx.Node) -> fx.Node:
        args, kwargs = map_aggregate(
            (node.args, node.kwargs), lambda a: self._now(a) if isinstance(a, fx.Node) else a
        )
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
