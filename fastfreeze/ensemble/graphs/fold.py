"""A graph of members in eval mode with its norms folded away, in the convolutions' best layout.

A norm is a scale and a shift per channel. Behind a convolution that nothing else reads they move
into its weight and bias; elsewhere they are applied in one pass with the ReLU that follows,
straight from the parts of a ``cat`` in front. Sums of a convolution and a shortcut, and the ReLU
behind, are made by the convolution itself. Whether and how a node is folded depends on the graph
and on an image's shape alone, never on the batch or a measurement.

Folded weights are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastfreeze.ensemble.graphs.flow import Flow, Program, copied, written
from fastfreeze.trimming.folds import Convolving, Norm
from fastfreeze.trimming.operations import Affine, may_take_winograd

# What these give, or if they work, depends on how their input lies in memory.
_MIND_LAYOUT = (
    *("view", "view_as", "as_strided", "as_strided_", "as_strided_scatter"),
    *("stride", "is_contiguous", "storage_offset", "data_ptr"),
)


class CannotFoldError(Exception):
    """Nothing can be folded; the message says why."""


@torch.no_grad()
def fold(flow: Flow) -> Program:
    """A graph without a value, folded.

    Raises:
        CannotFoldError: there is no convolution, a node draws random numbers, or something writes
            in place to what others read.
    """
    return _Folder(flow).program()


@dataclass(frozen=True)
class _Cat:
    """A value to be computed: ``parts`` side by side along the channels."""

    parts: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Affine:
    """A value to be computed: a norm, then perhaps ReLU."""

    x: fx.Node | _Cat
    norm: Norm
    relu: bool = False

    def operation(self) -> Affine:
        return Affine(*self.norm.affine(), self.norm.mean.dtype)


@dataclass
class _Convolution:
    """A value to be computed: a convolution, perhaps a norm, ``residual`` and ReLU behind it.

    ``affine`` is applied to ``x`` first, with a ReLU.
    """

    convolving: Convolving
    x: fx.Node
    affine: _Affine | None
    norm: Norm | None = None
    residual: fx.Node | None = None
    relu: bool = False


_Value = fx.Node | _Cat | _Affine | _Convolution


class _Folder:
    """Copies nodes in order; what one reader alone reads waits for what that makes of it."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        if flow.random:
            raise CannotFoldError("the model draws random numbers")
        if not any(self._calls_module(node, nn.Conv2d) for node in flow.graph.nodes):
            raise CannotFoldError("there is no convolution")
        self._graph = fx.Graph()
        self._values: dict[fx.Node, _Value] = {}

    def program(self) -> Program:
        for node in self._flow.graph.nodes:
            self._values[node] = self._value(node)
        return written(self._graph)

    def _value(self, node: fx.Node) -> _Value:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if not self._writes_to_its_own(node):
            raise CannotFoldError(f"{node.name} writes in place to what others may read")
        value = self._image(node, first) if self._is_batch_of_images(node) else None
        if value is not None:
            return value
        if _name(node) in _MIND_LAYOUT:  # and was written for this one
            return copied(self._graph, node, self._contiguous)
        return copied(self._graph, node, self._now)

    def _image(self, node: fx.Node, first: fx.Node | None) -> _Value | None:
        """The value of a node that gives images, if it is of a kind that can be folded."""
        name = _name(node)
        if first is None:
            return self._cat(node) if name in ("cat", "concat") else None
        if self._calls_module(node, nn.Conv2d):
            return self._convolution(cast(nn.Conv2d, self._flow.module(node)), first)
        if self._calls_module(node, nn.BatchNorm2d):
            return self._norm(cast(nn.BatchNorm2d, self._flow.module(node)), first)
        if self._calls_module(node, nn.ReLU) or name in ("relu", "relu_"):
            return self._relu(first)
        return self._sum(node) if name in ("add", "__iadd__") and not node.kwargs else None

    def _cat(self, node: fx.Node) -> _Value:
        tensors, *dims = (*node.args, *node.kwargs.values())
        if dims not in ([1], [-3]) or not isinstance(tensors, (tuple, list)):
            return copied(self._graph, node, self._now)
        parts: list[fx.Node] = []
        for source in cast(Sequence[fx.Node], tensors):
            x = self._values[source]
            parts += x.parts if isinstance(x, _Cat) else [self._now(source)]
        return _Cat(tuple(parts))

    def _convolution(self, m: nn.Conv2d, source: fx.Node) -> _Convolution:
        how: Any = (m.stride, m.padding, m.dilation, m.groups)
        x, convolving = self._values[source], Convolving(m.weight, m.bias, *how)
        if (
            isinstance(x, _Affine)
            and x.relu
            and isinstance(x.x, fx.Node)
            and may_take_winograd(convolving)
            and self._read_once(source)
        ):
            return _Convolution(convolving, x.x, x)
        return _Convolution(convolving, self._now(source), None)

    def _norm(self, module: nn.BatchNorm2d, source: fx.Node) -> _Value:
        mean, var = module.running_mean, module.running_var
        assert mean is not None
        assert var is not None
        norm, x = Norm(mean, var, module.weight, module.bias, module.eps), self._values[source]
        if isinstance(x, _Convolution) and x.norm is None and self._waits(source):
            x.norm = norm
            return x
        return _Affine(x if isinstance(x, _Cat) else self._now(source), norm)

    def _relu(self, source: fx.Node) -> _Value:
        x = self._values[source]
        if isinstance(x, _Affine):
            return replace(x, relu=True)
        if isinstance(x, _Convolution) and self._read_once(source):
            x.relu = True
            return x
        return self._graph.call_function(torch.relu, (self._now(source),))

    def _sum(self, node: fx.Node) -> _Value:
        a, b = node.args if len(node.all_input_nodes) == 2 else (None, None)
        for source, other in ((b, a), (a, b)):
            if isinstance(source, fx.Node) and isinstance(other, fx.Node) and self._waits(source):
                x = self._values[source]
                assert isinstance(x, _Convolution)
                if self._flow.forms.get(source) == self._flow.forms.get(other):
                    x.residual = self._now(other)
                    return x
        return copied(self._graph, node, self._now)

    def _now(self, node: fx.Node) -> fx.Node:
        """The copy of a node whose value is needed."""
        x = self._values[node]
        if isinstance(x, _Cat):
            x = self._graph.call_function(torch.cat, (x.parts, 1))
        elif isinstance(x, _Affine):
            parts = x.x.parts if isinstance(x.x, _Cat) else (x.x,)
            x = self._graph.call_function(_norm_relu(x), parts)
        elif isinstance(x, _Convolution):
            given = (x.x,) if x.residual is None else (x.x, x.residual)
            x = self._graph.call_function(_folded_convolution(x), given)
        self._values[node] = x
        return x

    def _contiguous(self, node: fx.Node) -> fx.Node:
        copy = self._now(node)
        is_tensor = node in self._flow.forms
        return self._graph.call_method("contiguous", (copy,)) if is_tensor else copy

    def _waits(self, node: fx.Node) -> bool:
        """Whether more can be added to the convolution that gives a node's value."""
        x = self._values[node]
        open_ended = isinstance(x, _Convolution) and x.residual is None and not x.relu
        return open_ended and self._read_once(node)

    def _read_once(self, node: fx.Node) -> bool:
        return len(node.users) == 1

    def _writes_to_its_own(self, node: fx.Node) -> bool:
        """Whether what a node writes to has had no other reader, under whatever name."""
        written = self._flow.writes[node]
        before = takewhile(lambda other: other is not node, self._flow.graph.nodes)
        return not written or all(
            other.op.startswith("call_") and self._read_once(other)
            for other in before
            if self._flow.storages[other] & written
        )

    def _calls_module(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        """Whether a node calls a module of exactly this kind, as its class defines it."""
        if node.op != "call_module":
            return False
        module = self._flow.module(node)
        if type(module) is not kind or "forward" in vars(module):
            return False
        if isinstance(module, nn.BatchNorm2d):
            return module.running_mean is not None
        return not isinstance(module, nn.Conv2d) or module.padding_mode == "zeros"

    def _is_batch_of_images(self, node: fx.Node) -> bool:
        shape, dtype = self._flow.forms.get(node, ((), torch.bool))
        return len(shape) == 4 and dtype.is_floating_point


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))


def _norm_relu(x: _Affine) -> Callable[..., Tensor]:
    """A norm in one pass over what it reads, with the ReLU behind it."""
    affine, relu = x.operation(), x.relu

    def norm_relu(*parts: Tensor) -> Tensor:
        return affine(parts, relu)

    return norm_relu


def _folded_convolution(x: _Convolution) -> Callable[..., Tensor]:
    """A convolution with what is folded into it."""
    convolution, relu = x.convolving.folded(x.norm), x.relu
    affine = x.affine.operation() if x.affine else None

    def folded_convolution(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return convolution(x, residual, relu, affine)

    return folded_convolution
