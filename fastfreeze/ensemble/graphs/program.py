"""A graph made a function again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import fx

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
