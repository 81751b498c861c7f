"""Frozen convolutions and norms that wait for what is done to their values, and do it on the way.

A frozen norm is a scale and a shift per channel. Behind a convolution they move into its weight and
bias; elsewhere they are applied in one pass with the ReLU that follows, straight from the parts of
a ``cat`` in front. Sums of a convolution and a shortcut, and the ReLU behind, are made by the
convolution itself. Nothing is recorded: each call of the model does this anew, so that nothing is
assumed of what the model decides on the way. Whether and how a value is folded depends on an
image's shape and on who has read it, never on a measurement: a resumed run computes the same bits.

Folded weights are copies: see ``folds``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfreeze.trimming.folds import Fold, Folds, Norm, folded, writes_to
from fastfreeze.trimming.operations import Affine, may_take_winograd
from fastfreeze.trimming.pending import (
    FUSED,
    LOCAL,
    Given,
    Node,
    Pending,
    TooLateError,
    current_run,
    node_of,
    settle,
)


class ConvNode(Node):
    """A convolution, perhaps with a norm, a residual and a ReLU behind it.

    Attributes:
        base: the same without the last of these; None for the convolution alone.
        step: what was done to that, as torch does it.
        depth: how much was done.
        passed: whether a value with more behind it has been computed without this one.
    """

    __slots__ = ("base", "counts", "depth", "norm", "passed", "relu", "residual", "step", "x")

    reader: ConvStandIn

    def __init__(self, stand_in: ConvStandIn, x: Node | None, shape: torch.Size, like: Any) -> None:
        super().__init__(shape, like.dtype, like.device, stand_in)
        self.x = x
        self.norm: Norm | None = None
        self.residual: Node | None = None
        self.relu, self.passed, self.depth = False, False, 0
        self.base: ConvNode | None = None
        self.step: Callable[[Tensor], Tensor] | None = None
        self.counts = writes_to(stand_in.tensors(None))

    def then(self, step: Callable[[Tensor], Tensor]) -> ConvNode | None:
        """A copy with another step behind it; None if this one's value is wanted itself."""
        if self.value is not None or self.relu or self.depth >= self.reader.depth:
            return None
        node = ConvNode(self.reader, self.x, self.shape, self)
        node.norm, node.residual, node.base, node.step = self.norm, self.residual, self, step
        node.depth, node.counts = self.depth + 1, self.counts
        return node

    def compute(self) -> Tensor:
        if self.passed:  # twice the work: next time it is computed once, for both
            self.reader.depth = self.depth
        known = self.base
        while known is not None and known.value is None:
            known = known.base
        value = self._with_folded() if known is None else self._as_torch()
        self.base = self.step = self.residual = self.x = None
        return value

    def _with_folded(self) -> Tensor:
        base = self.base
        while base is not None:
            base.passed = True
            base = base.base
        if self.base is None and not self.reader.takes_affine:
            self.reader.waits = False  # nothing was gained
            return self._as_torch()
        fold = self.reader.fold(self.norm, self.counts)
        if fold.refused or self.reader.folds.exact:
            return self._as_torch()
        residual = None if self.residual is None else self.residual.now()
        affine, x = None, self.x
        if isinstance(x, AffineNode) and self.reader.takes_affine and x.fits_convolution():
            affine, x = x.operation(), x.parts[0]
        assert x is not None
        source, operation = (x if affine else self.x), fold.operation
        assert source is not None
        value = source.now()
        found = fold.result(lambda: operation(value, residual, self.relu, affine), self._plain)
        moves = source.moved or value.is_contiguous()
        self.moved = moves if fold.checked else self._moved_plainly()
        return found

    def _as_torch(self) -> Tensor:
        value = self._plain()
        self.moved = self._moved_plainly()
        return value

    def _plain(self) -> Tensor:
        """As torch computes it, from the last value that is known."""
        if writes_to(self.reader.tensors(self.norm)) != self.counts:
            raise TooLateError(self.reader)
        if self.base is None:
            assert self.x is not None
            return self.reader.forward(self.x.now())
        assert self.step is not None
        base = self.base
        return self.step(base._plain() if base.value is None else base.now())

    def _moved_plainly(self) -> bool:
        """Whether the value, as torch computes it, lies otherwise than in the model as it is."""
        if self.base is None:
            assert self.x is not None
            return self.x.moved
        return self.base._moved_plainly() if self.base.value is None else self.base.moved


class AffineNode(Node):
    """A norm over the parts of a ``cat``, perhaps with a ReLU behind it.

    Attributes:
        base: the same without the ReLU.
    """

    __slots__ = ("base", "counts", "folds", "norm", "parts", "relu")

    def __init__(
        self, folds: Folds, parts: Sequence[Node], norm: Norm, shape: torch.Size, reader: Any
    ) -> None:
        super().__init__(shape, parts[0].dtype, parts[0].device, reader)
        self.folds, self.parts, self.norm = folds, parts, norm
        self.relu, self.counts = False, writes_to(norm.tensors())
        self.base: AffineNode | None = None

    def then_relu(self) -> AffineNode | None:
        """A copy with a ReLU behind it; None if this one's value is there."""
        if self.value is not None or self.relu:
            return None
        node = AffineNode(self.folds, self.parts, self.norm, self.shape, self.reader)
        node.relu, node.base, node.counts = True, self, self.counts
        return node

    def fits_convolution(self) -> bool:
        """Whether a convolution may compute it on the way."""
        known = self.value is not None or (self.base is not None and self.base.value is not None)
        return self.relu and len(self.parts) == 1 and not known and self._fold().checked

    def operation(self) -> Affine:
        """What computes it."""
        operation: Affine = self._fold().operation
        return operation

    def compute(self) -> Tensor:
        base = self.base
        if base is not None and base.value is not None:
            return torch.relu(base.now())
        parts = [part.now() for part in self.parts]
        self.moved = any(part.moved for part in self.parts)
        if self.folds.exact:
            value = self._plain(parts)
        else:
            fold = self._fold()
            value = fold.result(
                lambda: fold.operation(parts, self.relu), lambda: self._plain(parts)
            )
        self.parts, self.base = (), None
        return value

    def _fold(self) -> Fold:
        tensors, key = self.norm.tensors(), (0, id(self.norm.mean))
        make = lambda: Affine(*self.norm.affine(), self.dtype)  # noqa: E731
        return self.folds.get(key, tensors, self.counts, self.reader, make)

    def _plain(self, parts: Sequence[Tensor]) -> Tensor:
        if writes_to(self.norm.tensors()) != self.counts:
            raise TooLateError(self.reader)
        value = self.norm.plain(parts[0] if len(parts) == 1 else torch.cat(list(parts), 1))
        return value.relu_() if self.relu else value


class CatNode(Node):
    """Images side by side along the channels."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Node], shape: torch.Size) -> None:
        super().__init__(shape, parts[0].dtype, parts[0].device, None)
        self.parts = parts

    def compute(self) -> Tensor:
        value = torch.cat([part.now() for part in self.parts], 1)
        self.moved = any(part.moved for part in self.parts)
        self.parts = ()
        return value


class ConvStandIn:
    """Stands in for the forward of a frozen convolution.

    Attributes:
        forward: the module's own.
        waits: False if it has been found that what it reads is written to before it is read.
        depth: how much may be done to its value on the way; less where it is read in between.
        takes_affine: whether it may compute a norm in front of it.
        folds: the model's.
    """

    def __init__(self, module: nn.Conv2d, folds: Folds) -> None:
        self.module, self.forward = module, module.forward
        self.waits, self.depth = True, 4
        self.takes_affine = may_take_winograd(module)
        self.folds = folds
        self._shapes: dict[torch.Size, torch.Size | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        m = self.module
        node = waiting_input(x, m, m.weight, self) if self.waits else None
        if node is None:
            return self.forward(settle(x))
        if node.shape not in self._shapes:
            self._shapes[node.shape] = _convolved(m, node.shape)
        shape = self._shapes[node.shape]
        if shape is None:
            return self.forward(settle(x))
        return Pending.of(ConvNode(self, node, shape, node))

    def tensors(self, norm: Norm | None) -> list[Tensor]:
        """What it and the norm behind it compute with."""
        m = self.module
        own = [m.weight] if m.bias is None else [m.weight, m.bias]
        return own if norm is None else [*own, *norm.tensors()]

    def fold(self, norm: Norm | None, counts: int) -> Fold:
        """Its weights with those of the norm behind it, as they were after so many writes."""
        m = self.module
        key = id(m), 0 if norm is None else id(norm.mean)
        return self.folds.get(key, self.tensors(norm), counts, self, lambda: folded(m, norm))


class NormStandIn:
    """Stands in for the forward of a frozen norm.

    Attributes:
        forward, waits: as of a convolution's.
    """

    def __init__(self, module: nn.BatchNorm2d) -> None:
        self.module, self.forward = module, module.forward
        self.waits = True

    def __call__(self, x: Tensor) -> Tensor:
        m = self.module
        mean, var = m.running_mean, m.running_var
        if m.training or not self.waits or mean is None or var is None:
            return self.forward(settle(x))
        node = waiting_input(x, m, mean, self)
        norm = Norm(mean, var, m.weight, m.bias, m.eps)
        result = NotImplemented if node is None else _normed(node, norm, self)
        return self.forward(settle(x)) if result is NotImplemented else result


def waiting_input(x: Any, module: nn.Module, like: Tensor, reader: Any) -> Node | None:
    """The node of images ``x`` if a stand-in may wait with them; None if it is to step aside."""
    if LOCAL.run is None or like.requires_grad or not _is_plain(like):
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(x) is Pending:
        node = node_of(x, reader)
    elif isinstance(x, Tensor) and _may_be_read_later(x):
        node = Given(x, reader)
    else:
        return None
    fits = len(node.shape) == 4 and node.dtype == like.dtype and node.device == like.device
    mode = torch.is_inference_mode_enabled() or torch.is_autocast_enabled(node.device.type)
    return node if fits and not mode and node.dtype.is_floating_point else None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _may_be_read_later(x: Tensor) -> bool:
    return _is_plain(x) and not (x.requires_grad or x.is_inference() or x.is_neg())


def _convolved(module: nn.Conv2d, shape: torch.Size) -> torch.Size | None:
    """The shape that a convolution gives, if it is one that can be folded."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    if shape[1] != module.in_channels or 0 in shape:
        return None
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(
            shape[2:],
            module.padding,
            module.dilation,
            module.kernel_size,
            module.stride,
            strict=True,
        )
    ]
    return torch.Size((shape[0], module.out_channels, *sides)) if min(sides) > 0 else None


def _normed(x: Node, norm: Norm, reader: Any) -> Any:
    tensors = norm.tensors()
    if norm.mean.numel() != x.shape[1] or not all(
        _is_plain(t) and t.dtype == x.dtype and not t.requires_grad for t in tensors
    ):
        return NotImplemented
    if isinstance(x, ConvNode) and x.norm is None and x.residual is None:
        node = x.then(norm.plain)
        if node is not None:
            node.norm, node.counts = norm, node.counts + writes_to(tensors)
            return Pending.of(node)
    parts = x.parts if isinstance(x, CatNode) and x.value is None else (x,)
    return Pending.of(AffineNode(current_run().folds, parts, norm, x.shape, reader))


def _fuse(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have calls of these functions on pending values done by what is decorated."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        FUSED.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_fuse(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(x: Any) -> Any:
    return False if x.node.value is None else NotImplemented


@_fuse(F.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    unfit = training or running_mean is None or running_var is None
    if unfit or type(input) is not Pending or len(input.node.shape) != 4:
        return NotImplemented
    assert running_mean is not None
    assert running_var is not None
    return _normed(node_of(input), Norm(running_mean, running_var, weight, bias, eps), None)


@_fuse(F.relu, torch.relu, Tensor.relu)
def _relu(x: Any, inplace: bool = False) -> Any:
    node = x.node if type(x) is Pending else None
    new: Node | None = None
    if isinstance(node, ConvNode):
        new = node.then(torch.relu)
        if new is not None:
            new.relu = True
    elif isinstance(node, AffineNode):
        new = node.then_relu()
    return _become(x, new, inplace)


@_fuse(F.relu_, torch.relu_, Tensor.relu_)
def _relu_in_place(x: Any) -> Any:
    return _relu(x, True)


@_fuse(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(a: Any, b: Any, *, inplace: bool = False, **others: Any) -> Any:
    if others:  # alpha, out
        return NotImplemented
    if inplace and (type(a) is not Pending or a.node.value is not None):
        return NotImplemented
    for x, other in ((b, a), (a, b)):
        node = x.node if type(x) is Pending else None
        if not isinstance(node, ConvNode) or node.residual is not None:
            continue
        if not isinstance(other, Tensor) or (
            type(other) is not Pending and not _may_be_read_later(other)
        ):
            continue
        residual = node_of(other, node.reader)
        if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
            continue
        new = node.then(partial(_plus, residual))
        if new is not None:
            new.residual = residual
            return _become(a, new, inplace)
    return NotImplemented if inplace else _pass_on(torch.add, a, b)


def _plus(residual: Node, value: Tensor) -> Tensor:
    return value + residual.now()


@_fuse(Tensor.__iadd__, Tensor.add_)
def _add_in_place(a: Any, b: Any, **others: Any) -> Any:
    return _add(a, b, inplace=True, **others)


@_fuse(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Any, dim: int = 0, **others: Any) -> Any:
    if others or dim not in (1, -3) or not isinstance(tensors, (tuple, list)):
        return NotImplemented
    parts: list[Node] = []
    for tensor in tensors:
        if type(tensor) is not Pending and not _may_be_read_later(tensor):
            return NotImplemented
        node = node_of(tensor)
        parts += node.parts if isinstance(node, CatNode) else [node]
    first = parts[0]
    if len(first.shape) != 4 or not all(_lie_beside(first, part) for part in parts):
        return NotImplemented
    n, _, h, w = first.shape
    shape = torch.Size((n, sum([part.shape[1] for part in parts]), h, w))
    return Pending.of(CatNode(parts, shape))


def _lie_beside(a: Node, b: Node) -> bool:
    same = a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:] and len(b.shape) == 4
    return same and a.dtype == b.dtype and a.device == b.device


def _become(x: Any, node: Node | None, inplace: bool) -> Any:
    """A pending value of ``node``; ``x`` itself, made to be that, if in place."""
    if node is None:
        return NotImplemented
    if not inplace:
        return Pending.of(node)
    x.node = node
    return x


def _pass_on(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, to which layout is the same, on values in that in which they are."""
    if not current_run().restores:
        return NotImplemented
    pending = [a for a in args if type(a) is Pending]
    values = [a.node.get() if type(a) is Pending else a for a in args]
    result = function(*values, **kwargs)
    for a in pending:
        if result is a.node.value:
            return a
    if not _is_plain(result):
        return result
    given = Given(result)
    given.moved = any(a.node.moved for a in pending)
    return Pending.of(given)


for _function in (
    *(torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.relu6, F.hardtanh, F.hardswish),
    *(F.silu, F.gelu, F.hardsigmoid, torch.sigmoid, Tensor.sigmoid, torch.mul, Tensor.mul),
    *(Tensor.__mul__, Tensor.__rmul__, Tensor.sub, Tensor.__sub__),
):
    FUSED[_function] = partial(_pass_on, _function)
