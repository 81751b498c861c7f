"""A graph made a function again."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

Program = Callable[..., Any]  # of what holds the graph's attributes, then its placeholders
_NUMBERS = itertools.count()


def written(graph: fx.Graph) -> Program:
    """The graph as a Python function, whose first argument holds its attributes."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    # torch.compile tells functions apart by their files; those without a source share one limit.
    name = f"<fastfreeze program {next(_NUMBERS)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    exec(compile(code.src, name, "exec"), namespace)
    function = cast(Program, namespace["forward"])
    weakref.finalize(function, linecache.cache.pop, name, None)
    return function


def measured(graph: fx.Graph) -> tuple[Program, dict[str, Any]]:
    """As :func:`written`; a run leaves all nodes' values, by name and on the meta device."""
    values: dict[str, Any] = {}

    def seen(value: Any, name: str) -> Any:
        values[name] = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), value)
        return value

    own = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = copied(own, node, copies.__getitem__)
        if node.op not in ("get_attr", "output"):
            copies[node] = own.call_function(seen, (copies[node], node.name))
    return written(own), values


def copied(graph: fx.Graph, node: fx.Node, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of ``node``, last in ``graph``; ``now`` gives those of its inputs."""
    copy = graph.node_copy(node, now)
    copy.type = None
    return copy
