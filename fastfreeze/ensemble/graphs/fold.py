"""A graph of members in eval mode with its norms folded away, in the convolutions' best layout.

A norm is a scale and a shift per channel. Behind a convolution that nothing else reads they move
into its weight and bias; elsewhere one pass applies them, with the ReLU behind, straight to the
parts of a ``cat`` in front. A convolution also adds a shortcut to its result, and applies the ReLU
behind. How a node is folded depends on the graph and on an image's shape, never on the batch or a
measurement.

``trimming.fold`` finds the same in the calls of a running model, at tens of microseconds for each:
too many for small batches of several members. Both compute with ``trimming.folds``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastfreeze.ensemble.graphs.flow import Flow, Program, copied, written
from fastfreeze.ensemble.graphs.trace import NoGraphError
from fastfreeze.trimming.folds import Convolving, Norm
from fastfreeze.trimming.operations import Affine, may_take_winograd

# What these give, and whether they work, depends on how their input lies in memory.
_MIND_LAYOUT = (
    *("view", "view_as", "as_strided", "as_strided_", "as_strided_scatter"),
    *("stride", "is_contiguous", "storage_offset", "data_ptr"),
)


@torch.no_grad()
def fold(flow: Flow) -> Program:
    """The graph folded, as a function that returns nothing.

    Raises:
        NoGraphError: there is no convolution, a node draws random numbers, or something writes in
            place to what others read.
    """
    return written(_Folder(flow).graph)


@dataclass(frozen=True)
class _Fused:
    """A value that one function will compute, by those steps of the following that it has.

    It puts the parts side by side along the channels; applies ``affine``, with a ReLU where a
    convolution follows; applies a convolution and a norm; adds the residual; applies a ReLU.
    """

    parts: tuple[fx.Node, ...]
    affine: Affine | None = None
    convolving: Convolving | None = None
    norm: Norm | None = None
    residual: fx.Node | None = None
    relu: bool = False

    @property
    def is_affine(self) -> bool:
        return self.convolving is None and self.affine is not None

    def function(self) -> Callable[..., Tensor]:
        """Takes the parts, then the residual."""
        relu, affine = self.relu, self.affine
        convolution = self.convolving and self.convolving.folded(self.norm)

        def fused(*given: Tensor) -> Tensor:
            if convolution:
                x, *residual = given
                return convolution(x, residual[0] if residual else None, relu, affine)
            return affine(given, relu) if affine else torch.cat(given, 1)

        return fused


class _Folder:
    """Copies nodes in order; a value with one reader waits for what that reader does to it.

    Attributes:
        graph: the folded graph.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        if flow.random:
            raise NoGraphError("the model draws random numbers")
        if not any(isinstance(self._layer(node), nn.Conv2d) for node in flow.graph.nodes):
            raise NoGraphError("there is no convolution")
        self.graph = fx.Graph()
        self._values: dict[fx.Node, fx.Node | _Fused] = {}
        for node in flow.graph.nodes:
            if not self._writes_to_its_own(node):
                raise NoGraphError(f"{node.name} writes in place to what others may read")
            now = self._contiguous if _name(node) in _MIND_LAYOUT else self._now
            fused = self._fused(node) if self._is_batch_of_images(node) else None
            self._values[node] = fused or copied(self.graph, node, now)

    def _fused(self, node: fx.Node) -> fx.Node | _Fused | None:
        """The value of a node that gives images; None if the node cannot be folded."""
        name, layer = _name(node), self._layer(node)
        first = node.args[0] if node.args else None
        if name in ("cat", "concat"):
            return self._cat(*node.args, *node.kwargs.values())
        if not isinstance(first, fx.Node):
            return None
        if isinstance(layer, nn.Conv2d):
            return self._convolution(layer, first)
        if isinstance(layer, nn.BatchNorm2d):
            return self._norm(layer, first)
        if isinstance(layer, nn.ReLU) or name in ("relu", "relu_"):
            return self._relu(first)
        return self._sum(node) if name in ("add", "__iadd__") and not node.kwargs else None

    def _cat(self, tensors: Any, dim: Any = 0, *others: Any) -> _Fused | None:
        if dim not in (1, -3) or others or not isinstance(tensors, (tuple, list)):
            return None
        return _Fused(tuple(part for source in tensors for part in self._parts(source)))

    def _parts(self, source: fx.Node) -> tuple[fx.Node, ...]:
        """The parts of a cat that waits; any other value is its only part."""
        x = self._values[source]
        if isinstance(x, _Fused) and x.convolving is None and x.affine is None:
            return x.parts
        return (self._now(source),)

    def _convolution(self, m: nn.Conv2d, source: fx.Node) -> _Fused:
        how: Any = (m.stride, m.padding, m.dilation, m.groups)
        x, convolving = self._values[source], Convolving(m.weight, m.bias, *how)
        alone = len(source.users) == 1 and may_take_winograd(convolving)
        if alone and isinstance(x, _Fused) and x.is_affine and x.relu and len(x.parts) == 1:
            return _Fused(x.parts, x.affine, convolving)
        return _Fused((self._now(source),), None, convolving)

    def _norm(self, m: nn.BatchNorm2d, source: fx.Node) -> _Fused:
        assert m.running_mean is not None
        assert m.running_var is not None
        norm = Norm(m.running_mean, m.running_var, m.weight, m.bias, m.eps)
        x = self._open(source)
        if x is not None and x.norm is None:
            return replace(x, norm=norm)
        return _Fused(self._parts(source), Affine(*norm.affine(), m.running_mean.dtype))

    def _relu(self, source: fx.Node) -> fx.Node | _Fused:
        x = self._values[source]
        if isinstance(x, _Fused) and (x.is_affine or (x.convolving and len(source.users) == 1)):
            return replace(x, relu=True)
        return self.graph.call_function(torch.relu, (self._now(source),))

    def _sum(self, node: fx.Node) -> _Fused | None:
        a, b = node.args if len(node.all_input_nodes) == 2 else (None, None)
        for source, other in ((b, a), (a, b)):
            if not (isinstance(source, fx.Node) and isinstance(other, fx.Node)):
                continue
            x = self._open(source)
            if x is not None and self._flow.forms.get(source) == self._flow.forms.get(other):
                return replace(x, residual=self._now(other))
        return None

    def _open(self, node: fx.Node) -> _Fused | None:
        """The convolution that gives a node's value, if it can still take a norm or a sum."""
        x = self._values[node]
        if not isinstance(x, _Fused) or x.convolving is None or len(node.users) > 1:
            return None
        return None if x.residual is not None or x.relu else x

    def _now(self, node: fx.Node) -> fx.Node:
        """The copy of a node, computed now if its value has waited."""
        x = self._values[node]
        if isinstance(x, _Fused):
            given = x.parts if x.residual is None else (*x.parts, x.residual)
            x = self._values[node] = self.graph.call_function(x.function(), given)
        return x

    def _contiguous(self, node: fx.Node) -> fx.Node:
        """As ``_now``, in the layout that the model's forward expects."""
        copy = self._now(node)
        is_tensor = node in self._flow.forms
        return self.graph.call_method("contiguous", (copy,)) if is_tensor else copy

    def _writes_to_its_own(self, node: fx.Node) -> bool:
        """Whether no other node has read the memory that a node writes to, under whatever name."""
        written = self._flow.writes[node]
        before = takewhile(lambda other: other is not node, self._flow.graph.nodes)
        return not written or all(
            other.op.startswith("call_") and len(other.users) == 1
            for other in before
            if self._flow.storages[other] & written
        )

    def _layer(self, node: fx.Node) -> nn.Module | None:
        """The convolution, norm or ReLU that a node calls, if it computes as its class does."""
        m = self._flow.fetch_attr(str(node.target)) if node.op == "call_module" else None
        plain = (
            type(m) is nn.ReLU
            or (type(m) is nn.Conv2d and m.padding_mode == "zeros")
            or (type(m) is nn.BatchNorm2d and m.running_mean is not None)
        )
        return m if plain and "forward" not in vars(m) else None

    def _is_batch_of_images(self, node: fx.Node) -> bool:
        shape, dtype = self._flow.forms.get(node, ((), torch.bool))
        return len(shape) == 4 and dtype.is_floating_point


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))
