"""A graph of members in eval mode with its norms folded away, in the convolutions' best layout.

A norm is a scale and a shift per channel. Behind a convolution that nothing else reads they move
into its weight and bias; elsewhere they are applied in one pass with the ReLU that follows,
straight from the parts of a ``cat`` in front. Sums of a convolution and a shortcut, and the ReLU
behind, are made by the convolution itself. Whether and how a node is folded depends on the graph
and on an image's shape alone, never on the batch or a measurement.

Folded weights are copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastfreeze.ensemble.graphs.dataflow import Dataflow, called_name, minds_layout
from fastfreeze.ensemble.graphs.program import Program, copied, written
from fastfreeze.trimming.folds import Norm
from fastfreeze.trimming.operations import Affine, Convolution, may_take_winograd


class CannotFoldError(Exception):
    """Nothing can be folded; the message says why."""


@torch.no_grad()
def fold(flow: Dataflow, metas: Mapping[str, Any]) -> Program:
    """A graph without a value, folded.

    Args:
        flow: of the graph.
        metas: nodes' values, by name, on the meta device.

    Raises:
        CannotFoldError: there is no convolution, or something writes in place to what others read.
    """
    return _Folder(flow, metas).program()


@dataclass(frozen=True)
class _Cat:
    """A value to be computed: ``parts`` side by side along the channels."""

    parts: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Affine:
    """A value to be computed: ``x * scale + shift`` per channel, then perhaps ReLU."""

    x: fx.Node | _Cat
    scale: Tensor
    shift: Tensor
    dtype: torch.dtype
    relu: bool = False


@dataclass
class _Convolution:
    """A value to be computed: a convolution, perhaps plus ``residual``, then perhaps ReLU.

    ``affine`` is applied to ``x`` first, with a ReLU.
    """

    module: nn.Conv2d
    x: fx.Node
    affine: _Affine | None
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    residual: fx.Node | None = None
    relu: bool = False


_Value = fx.Node | _Cat | _Affine | _Convolution


class _Folder:
    """Copies nodes in order; what one reader alone reads waits for what that makes of it."""

    def __init__(self, flow: Dataflow, metas: Mapping[str, Any]) -> None:
        self._flow, self._metas = flow, metas
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
        if not all(map(self._is_passed_on, self._flow.written_by(node))):
            raise CannotFoldError(f"{node.name} writes in place to what others may read")
        value = self._image(node, first) if self._is_batch_of_images(node) else None
        if value is not None:
            return value
        if minds_layout(node):  # and was written for this one
            return copied(self._graph, node, self._contiguous)
        return copied(self._graph, node, self._now)

    def _image(self, node: fx.Node, first: fx.Node | None) -> _Value | None:
        """The value of a node that gives images, if it is of a kind that can be folded."""
        name = "" if node.op == "call_module" else called_name(node)
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

    def _convolution(self, module: nn.Conv2d, source: fx.Node) -> _Convolution:
        x, affine = self._values[source], None
        if isinstance(x, _Affine) and x.relu and isinstance(x.x, fx.Node):
            fits = may_take_winograd(module) and self._read_once(source)
            affine = x if fits else None
        return _Convolution(
            module,
            cast(fx.Node, affine.x) if affine else self._now(source),
            affine,
            module.weight.detach().double(),
            None if module.bias is None else module.bias.detach().double(),
            module.weight.dtype,
        )

    def _norm(self, module: nn.BatchNorm2d, source: fx.Node) -> _Value:
        mean, var = module.running_mean, module.running_var
        assert mean is not None
        assert var is not None
        scale, shift = Norm(mean, var, module.weight, module.bias, module.eps).affine()
        x = self._values[source]
        if isinstance(x, _Convolution) and self._waits(source):
            x.weight = x.weight * scale[:, None, None, None]
            x.bias = shift if x.bias is None else x.bias * scale + shift
            return x
        parts = x if isinstance(x, _Cat) else self._now(source)
        return _Affine(parts, scale, shift, mean.dtype)

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
                if _alike(self._metas.get(source.name), self._metas.get(other.name)):
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
            x = self._graph.call_function(_NormRelu(x), parts)
        elif isinstance(x, _Convolution):
            given = (x.x,) if x.residual is None else (x.x, x.residual)
            x = self._graph.call_function(_FoldedConvolution(x), given)
        self._values[node] = x
        return x

    def _contiguous(self, node: fx.Node) -> fx.Node:
        is_tensor = isinstance(self._metas.get(node.name), Tensor)
        copy = self._now(node)
        return self._graph.call_method("contiguous", (copy,)) if is_tensor else copy

    def _waits(self, node: fx.Node) -> bool:
        """Whether more can be added to the convolution that gives a node's value."""
        x = self._values[node]
        open_ended = isinstance(x, _Convolution) and x.residual is None and not x.relu
        return open_ended and self._read_once(node)

    def _read_once(self, node: fx.Node) -> bool:
        return len(node.users) == 1

    def _is_passed_on(self, node: fx.Node) -> bool:
        """Whether a value has no other reader and no other name, so that writing to it is safe."""
        if not node.op.startswith("call_") or not self._read_once(node):
            return False
        flow = self._flow
        if flow.storages[node] == {node}:
            return True
        names = flow.written_by(node) or [
            i for i in flow.inputs(node) if flow.storages[i] & flow.storages[node]
        ]
        return len(names) == 1 and self._is_passed_on(names[0])

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
        meta = self._metas.get(node.name)
        return isinstance(meta, Tensor) and meta.ndim == 4 and meta.is_floating_point()


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are tensors of one shape and dtype."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype


class _Operation:
    """What a folded node calls; fx wants a name."""

    __name__ = "folded"


class _NormRelu(_Operation):
    """A norm in one pass over what it reads, with the ReLU behind it."""

    def __init__(self, x: _Affine) -> None:
        self.affine = Affine(x.scale, x.shift, x.dtype)
        self._relu = x.relu

    def __call__(self, *parts: Tensor) -> Tensor:
        return self.affine(parts, self._relu)


class _FoldedConvolution(_Operation):
    """A convolution with what is folded into it."""

    def __init__(self, x: _Convolution) -> None:
        self._convolution = Convolution(x.module, x.weight, x.bias, x.dtype)
        self._affine = Affine(x.affine.scale, x.affine.shift, x.affine.dtype) if x.affine else None
        self._relu = x.relu

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._convolution(x, residual, self._relu, self._affine)
