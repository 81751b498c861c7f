"""Frozen convolutions and norms that wait for what is done to their values, and do it on the way.

A frozen norm is a scale and a shift per channel. Behind a convolution they move into its weight and
bias; elsewhere they are applied in one pass with the ReLU that follows, straight from the parts of
a ``cat`` in front. Sums of a convolution and a shortcut, and the ReLU behind, are made by the
convolution itself. All this is found in the calls of torch's functions as they come, with the
arguments that they have, anew in each call of the model. Nothing that requires grad waits, or goes
into what waits. What is folded depends on shapes and on who holds a value, never on a measurement
or an earlier call: a resumed run computes the same bits.

Folded weights are copies: see ``folds``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from fastfreeze.trimming.folds import Convolving, Fold, Norm, folded
from fastfreeze.trimming.operations import Affine, may_take_winograd
from fastfreeze.trimming.pending import FUSED, Given, Node, Pending, Run, TooLateError, node_of


class FusedNode(Node):
    """What a fused function gives, computed as where it was called.

    Attributes:
        base: the same without what was done last; None if there is no such.
    """

    __slots__ = ("base", "run", "tensors", "versions")

    def __init__(
        self, run: Run, shape: torch.Size, like: Node, tensors: Sequence[Tensor], base: Any = None
    ) -> None:
        super().__init__(shape, like.dtype, like.device, None)
        self.run, self.tensors, self.base = run, tensors, base
        if base is not None:
            base.passed = True
        self.versions = [t._version for t in tensors]

    def _set(self) -> None:
        kind = self.device.type
        autocasts = torch.is_autocast_enabled(kind)
        outside = torch.autocast(kind, enabled=False) if autocasts else nullcontext()
        with torch.inference_mode(False), torch._C.DisableTorchFunction(), outside:
            value = self.compute().data  # torch has counted no write to it
            self.version, self.value, self.base = value._version, value, None

    def _check(self) -> None:
        """See that the weights are as they were.

        Raises:
            TooLateError: they are not.
        """
        if [t._version for t in self.tensors] != self.versions:
            raise TooLateError(None)


class ConvNode(FusedNode):
    """A convolution, perhaps with a norm, a residual and a ReLU behind it.

    Attributes:
        step: what was done to the base, as torch does it.
    """

    __slots__ = ("convolving", "norm", "relu", "residual", "step", "x")

    def __init__(
        self, run: Run, x: Node, convolving: Convolving, shape: torch.Size, base: Any = None
    ) -> None:
        super().__init__(run, shape, x, convolving.tensors(), base)
        self.x, self.convolving = x, convolving
        self.norm: Norm | None = None
        self.residual: Node | None = None
        self.relu = False
        self.step: Callable[[Tensor], Tensor] | None = None

    def then(self, step: Callable[[Tensor], Tensor]) -> ConvNode | None:
        """A copy with another step behind it; None if this one's value is there."""
        if self.value is not None or self.relu:
            return None
        node = ConvNode(self.run, self.x, self.convolving, self.shape, self)
        node.norm, node.residual, node.step = self.norm, self.residual, step
        node.tensors, node.versions = self.tensors, self.versions
        return node

    def then_norm(self, norm: Norm) -> ConvNode | None:
        if self.norm is not None or self.residual is not None:
            return None
        node = self.then(norm.plain)
        if node is not None:
            own = norm.tensors()
            node.norm, node.tensors = norm, [*self.tensors, *own]
            node.versions = [*self.versions, *[t._version for t in own]]
        return node

    def compute(self) -> Tensor:
        residual = None if self.residual is None else self.residual.now()
        self._check()
        base = self.base
        while base is not None and base.value is None:
            base = base.base
        alone = self.base is None and not may_take_winograd(self.convolving)
        fold = None if base is not None or alone or self.run.folds.exact else self._fold()
        value = self._plain() if fold is None or fold.refused else self._folded(fold, residual)
        source = self.x
        if isinstance(source, AffineNode) and source.value is None:  # computed on the way
            source = source.parts[0]
        moved = source.moved or (self.residual is not None and self.residual.moved)
        self.moved = moved or (source.now().is_contiguous() and not value.is_contiguous())
        return value

    def _set(self) -> None:
        super()._set()
        self.step = self.residual = None

    def _fold(self) -> Fold:
        convolving, norm = self.convolving, self.norm
        key = convolving.key(), None if norm is None else norm.key()
        fold: Fold = self.run.folds.get(key, self.tensors, lambda: folded(convolving, norm))
        return fold

    def _folded(self, fold: Fold, residual: Tensor | None) -> Tensor:
        affine, x = None, self.x
        if isinstance(x, AffineNode) and x.value is None and x.fits_convolution():
            affine, x = x.fold().operation, x.parts[0]
        value, operation = x.now(), fold.operation
        return fold.result(lambda: operation(value, residual, self.relu, affine), self._plain)

    def _plain(self) -> Tensor:
        """As torch computes it, from the last value that is known."""
        if self.base is None:
            return self.convolving.plain(self.x.now())
        assert self.step is not None
        base = self.base
        return self.step(base._plain() if base.value is None else base.now())


class AffineNode(FusedNode):
    """A norm over the parts of a ``cat``, perhaps with a ReLU behind it."""

    __slots__ = ("norm", "parts", "relu")

    def __init__(
        self, run: Run, parts: Sequence[Node], norm: Norm, shape: torch.Size, base: Any = None
    ) -> None:
        super().__init__(run, shape, parts[0], norm.tensors(), base)
        self.parts, self.norm, self.relu = parts, norm, base is not None

    def then_relu(self) -> AffineNode | None:
        """A copy with a ReLU behind it; None if this one's value is there."""
        if self.value is not None or self.relu:
            return None
        node = AffineNode(self.run, self.parts, self.norm, self.shape, self)
        node.versions = self.versions
        return node

    def fits_convolution(self) -> bool:
        """Whether a convolution may compute it on the way."""
        apart = self.relu and len(self.parts) == 1 and self.base.value is None
        return apart and self.fold().checked

    def fold(self) -> Fold:
        self._check()
        make = lambda: Affine(*self.norm.affine(), self.dtype)  # noqa: E731
        key = None, self.norm.key(), self.dtype
        fold: Fold = self.run.folds.get(key, self.tensors, make)
        return fold

    def compute(self) -> Tensor:
        self._check()
        if self.base is not None and self.base.value is not None:
            self.moved = self.base.moved
            return torch.relu(self.base.now())
        parts = [part.now() for part in self.parts]
        plain = partial(self._plain, parts)
        if self.run.folds.exact:
            value = plain()
        else:
            fold = self.fold()
            value = fold.result(lambda: fold.operation(parts, self.relu), plain)
        self.moved = any(part.moved for part in self.parts)
        return value

    def _set(self) -> None:
        super()._set()
        self.parts = ()

    def _plain(self, parts: Sequence[Tensor]) -> Tensor:
        value = self.norm.plain(parts[0] if len(parts) == 1 else torch.cat(list(parts), 1))
        return value.relu_() if self.relu else value


class CatNode(FusedNode):
    """Images side by side along the channels."""

    __slots__ = ("parts",)

    def __init__(self, run: Run, parts: Sequence[Node], shape: torch.Size) -> None:
        super().__init__(run, shape, parts[0], ())
        self.parts = parts

    def compute(self) -> Tensor:
        value = torch.cat([part.now() for part in self.parts], 1)
        self.moved = any(part.moved for part in self.parts)
        return value


def _fuse(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have calls of these functions done by what is decorated, if it does not decline."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        FUSED.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_fuse(F.conv2d)
def _conv2d(
    run: Run,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *rest: Any,
    **others: Any,
) -> Any:
    if id(weight) not in run.known or rest or others or isinstance(padding, str):
        return NotImplemented
    s, p, d = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
    convolving = Convolving(weight, bias, s, p, d, groups)
    node = _images(run, x, convolving.tensors())
    shape = None if node is None else _convolved(node.shape, weight.shape, s, p, d, groups)
    if node is None or shape is None:
        return NotImplemented
    if isinstance(node, AffineNode) and may_take_winograd(convolving):
        node.passed = True
    else:
        node.get()  # it is read for certain, and so stays a short way back
    return run.wait(ConvNode(run, node, convolving, shape))


@_fuse(F.batch_norm)
def _batch_norm(
    run: Run,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
    **others: Any,
) -> Any:
    if training or id(running_mean) not in run.known or running_var is None or rest or others:
        return NotImplemented
    norm = Norm(running_mean, running_var, weight, bias, eps)
    x = _images(run, input, norm.tensors())
    if x is None or any(t.shape != x.shape[1:2] for t in norm.tensors()):
        return NotImplemented
    node = x.then_norm(norm) if isinstance(x, ConvNode) else None
    if node is not None:
        return run.wait(node)
    x.passed = True
    parts = x.parts if isinstance(x, CatNode) and x.value is None else (x,)
    for part in parts:
        part.get()
    return run.wait(AffineNode(run, parts, norm, x.shape))


@_fuse(F.relu, torch.relu, Tensor.relu)
def _relu(run: Run, x: Any, inplace: bool = False, *rest: Any, **others: Any) -> Any:
    if type(x) is not Pending or rest or others:
        return NotImplemented
    node = x.node
    new: Node | None = None
    if isinstance(node, AffineNode):
        new = node.then_relu()
    elif isinstance(node, ConvNode):
        if (chained := node.then(torch.relu)) is not None:
            chained.relu = True
        new = chained
    return NotImplemented if new is None else run.wait(new, x if inplace else None)


@_fuse(F.relu_, torch.relu_, Tensor.relu_)
def _relu_in_place(run: Run, x: Any, *rest: Any, **others: Any) -> Any:
    return _relu(run, x, True, *rest, **others)


@_fuse(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(run: Run, a: Any, b: Any = None, *rest: Any, inplace: bool = False, **others: Any) -> Any:
    if rest or others:  # alpha, out
        return NotImplemented
    if inplace and (type(a) is not Pending or a.node.value is not None):
        return NotImplemented
    for x, other in ((b, a), (a, b)):
        node = x.node if type(x) is Pending else None
        if not isinstance(node, ConvNode) or node.residual is not None:
            continue
        residual = node_of(other) if _may_be_read_later(other) else None
        if residual is None or _form(residual) != _form(node):
            continue
        new = node.then(partial(_plus, residual))
        if new is not None:
            new.residual = residual
            return run.wait(new, a if inplace else None)
    return NotImplemented


def _plus(residual: Node, value: Tensor) -> Tensor:
    return value + residual.now()


@_fuse(Tensor.__iadd__, Tensor.add_)
def _add_in_place(run: Run, a: Any, b: Any = None, *rest: Any, **others: Any) -> Any:
    return NotImplemented if others else _add(run, a, b, *rest, inplace=True)


@_fuse(torch.cat, torch.concat, torch.concatenate)
def _cat(run: Run, tensors: Any, dim: int = 0, *rest: Any, **others: Any) -> Any:
    if rest or others or dim not in (1, -3) or not isinstance(tensors, (tuple, list)):
        return NotImplemented
    if not any(type(t) is Pending for t in tensors) or not all(map(_may_be_read_later, tensors)):
        return NotImplemented
    parts: list[Node] = []
    for node in map(node_of, tensors):
        parts += node.parts if isinstance(node, CatNode) and node.value is None else [node]
    n, *rest_of_shape = parts[0].shape
    forms = {(p.shape[:1], p.shape[2:], len(p.shape), p.dtype, p.device) for p in parts}
    if len(forms) > 1 or len(rest_of_shape) != 3:
        return NotImplemented
    shape = torch.Size((n, sum([p.shape[1] for p in parts]), *rest_of_shape[1:]))
    return run.wait(CatNode(run, parts, shape))


def _pass_on(
    function: Callable[..., Any], run: Run, x: Any, *args: Any, inplace: bool = False, **kwargs: Any
) -> Any:
    """Call a function, to which layout is the same, on values in that in which they are.

    It writes to nothing, so that what was put off may stay so.
    """
    given = [x, *args, *kwargs.values()]
    tensors = [t for t in given if isinstance(t, Tensor)]
    if type(x) is not Pending or not all(map(_may_be_read_later, tensors)):
        return NotImplemented
    if "out" in kwargs or not _may_wait_here(run, x.device.type):
        return NotImplemented
    nodes = [t.node for t in tensors if type(t) is Pending]
    values = [_now(t) for t in (x, *args)]
    if function in _IN_ORDER:
        values[0] = values[0].contiguous() if nodes[0].moved else values[0]
    with torch._C.DisableTorchFunction():
        result = Given(function(*values, **{name: _now(t) for name, t in kwargs.items()}))
    result.moved = any(node.moved for node in nodes)
    return run.wait(result, x if inplace else None)


def _now(value: Any) -> Any:
    return value.node.get() if type(value) is Pending else value


_IN_ORDER = (torch.mean, Tensor.mean)  # the order of memory is in their rounding
for _function in (
    *(*_IN_ORDER, F.max_pool2d, F.avg_pool2d, F.relu6),
    *(F.hardtanh, F.hardswish, F.silu, F.gelu, F.mish, F.leaky_relu, F.hardsigmoid),
    *(torch.sigmoid, Tensor.sigmoid, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
):
    FUSED[_function] = partial(_pass_on, _function)


def may_fold(tensor: Any) -> bool:
    """Whether a frozen tensor is one that folded weights may be made of."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    return plain and not (tensor.requires_grad or tensor.is_inference())


def _images(run: Run, x: Any, weights: Sequence[Tensor]) -> Node | None:
    """The node of images ``x`` if a function of them and ``weights`` may wait."""
    if not _may_be_read_later(x) or not _may_wait_here(run, x.device.type):
        return None
    node = node_of(x)
    fits = len(node.shape) == 4 and node.dtype.is_floating_point and 0 not in node.shape
    go_together = all(
        id(t) in run.known
        and not t.requires_grad
        and t.dtype == node.dtype
        and t.device == node.device
        for t in weights
    )
    return node if fits and go_together else None


def _may_wait_here(run: Run, device: str) -> bool:
    """Whether nothing is switched on that looks at what functions compute, or changes it."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device)
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > run.own_modes
        # An activation checkpoint, perhaps: the second forward does not come here.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _may_be_read_later(x: Any) -> bool:
    """Whether it is a tensor that may go into what waits."""
    if type(x) is Pending:
        with torch._C.DisableTorchFunction():
            return not x.requires_grad
    plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided
    return plain and not (x.requires_grad or x.is_inference() or x.is_neg() or x.is_meta)


def _form(node: Node) -> tuple[Any, ...]:
    return node.shape, node.dtype, node.device


@lru_cache(maxsize=4096)
def _convolved(
    shape: torch.Size, weight: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Size | None:
    """The shape that a convolution gives; None where torch is to say what is wrong."""
    how = (stride, padding, dilation)
    if any(len(v) != 2 for v in how) or len(weight) != 4 or shape[1] != weight[1] * groups:
        return None
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(shape[2:], padding, dilation, weight[2:], stride, strict=True)
    ]
    valid = min(sides) > 0 and min(stride) > 0 and min(padding) >= 0 and min(dilation) > 0
    return torch.Size((shape[0], weight[0], *sides)) if valid else None
