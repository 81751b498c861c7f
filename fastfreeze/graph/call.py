"""A call of a trimmed model that has been looked at and has not run yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastfreeze.graph.graphs import TrimmedGraph
from fastfreeze.graph.prefix import Prefix, Values


@dataclass(frozen=True)
class Call:
    """What a call will do.

    Attributes:
        run: does all of it; returns the model's output.
        reason: why the frozen prefix cannot run on its own in this call; empty if it can.
        tensors: the call's tensors, in the graph's order; empty without a prefix.
    """

    run: Callable[[], Any]
    reason: str = ""
    tensors: list[Tensor] = field(default_factory=list)
    graph: TrimmedGraph | None = None

    @property
    def prefix(self) -> Prefix | None:
        """What can run first; None if :attr:`reason` says so."""
        return None if self.reason or self.graph is None else self.graph.prefix

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the prefix reads."""
        return [self.tensors[i] for i in self.prefix.inputs] if self.prefix else []

    def finish(self, values: Values) -> Any:
        """The model's output, from what :meth:`Prefix.run` gave; with a prefix only."""
        assert self.graph is not None
        return self.graph.finish(self.tensors, values)
