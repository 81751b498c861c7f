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

from fastfreeze.trimming.folds import Constants, Convolving, Fold, Norm
from fastfreeze.trimming.operations import Affine, Convolution, may_take_winograd
from fastfreeze.trimming.pending import (
    FUSED,
    Given,
    Node,
    Pending,
    Run,
    may_wait,
    node_of,
)


class FusedNode(Node):
    """What fused functions give, computed as where they were called.

    That is, as far as they are there, and in this order: the parts side by side along the channels,
    a convolution, a norm, a residual that is added, and a ReLU.

    Attributes:
        base: the same without what was done last; None if there is no such.
    """

    __slots__ = ("base", "convolving", "norm", "parts", "relu", "residual", "run")

    def __init__(
        self,
        run: Run,
        parts: Sequence[Node],
        shape: torch.Size,
        convolving: Convolving | None = None,
        norm: Norm | None = None,
        residual: Node | None = None,
        relu: bool = False,
        base: FusedNode | None = None,
    ) -> None:
        super().__init__(shape, parts[0].dtype, parts[0].device)
        self.run, self.parts, self.base = run, parts, base
        self.convolving, self.norm, self.residual, self.relu = convolving, norm, residual, relu
        if base is not None:
            base.passed = True

    @property
    def is_cat(self) -> bool:
        return self.convolving is None and self.norm is None

    @property
    def is_affine(self) -> bool:
        return self.convolving is None and self.norm is not None

    def then(
        self, norm: Norm | None = None, residual: Node | None = None, relu: bool = False
    ) -> FusedNode | None:
        """With one of these behind it; None if it cannot be, or the value is there."""
        if self.value is not None or self.relu or self.is_cat:
            return None
        if norm and (self.norm or self.residual):
            return None
        if residual and (self.is_affine or self.residual):
            return None
        own = self.run, self.parts, self.shape, self.convolving
        return FusedNode(*own, norm or self.norm, residual or self.residual, relu, self)

    def fits_convolution(self) -> bool:
        """Whether a convolution may compute it on the way."""
        if self.value is not None or not (self.is_affine and self.relu):
            return False
        base = self.base
        alone = len(self.parts) == 1 and base is not None and base.value is None
        return alone and self._fold().checked

    def _compute(self) -> Tensor:
        if self.residual is not None:
            self.residual.get()
        self._constants()
        base = self.base
        while base is not None and base.value is None:
            base = base.base
        alone = self.is_cat or (
            self.convolving and self.base is None and not may_take_winograd(self.convolving)
        )
        if base is not None or alone or self.run.folds.exact:
            value = self._plain()
        else:
            fold = self._fold()
            value = fold.result(partial(self._folded, fold), self._plain)
        sources = self.parts
        if self.convolving:
            if isinstance(sources[0], FusedNode) and sources[0].value is None:
                sources = sources[0].parts  # computed on the way
            self.moved = sources[0].now().is_contiguous() and not value.is_contiguous()
        nodes = (*sources, base, self.residual)
        self.moved = self.moved or any(node.moved for node in nodes if node is not None)
        return value

    def _set(self) -> None:
        kind = self.device.type
        autocasts = torch.is_autocast_enabled(kind)
        outside = torch.autocast(kind, enabled=False) if autocasts else nullcontext()
        with torch.inference_mode(False), torch._C.DisableTorchFunction(), outside:
            value = self._compute().data  # torch has counted no write to it
            self.version, self.value = value._version, value
        self.parts, self.base, self.residual = (), None, None

    def _constants(self) -> list[Constants]:
        """What it computes with; raises TooLateError if that is not as it was."""
        both: tuple[Constants | None, ...] = self.convolving, self.norm
        found = [c for c in both if c is not None]
        for constants in found:
            constants.check()
        return found

    def _fold(self) -> Fold:
        constants, dtype = self._constants(), self.dtype

        def make() -> Affine | Convolution:
            if self.convolving is not None:
                return self.convolving.folded(self.norm)
            assert self.norm is not None
            return Affine(*self.norm.affine(), dtype)

        key = *[(type(c), c.key) for c in constants], dtype
        tensors = [t for c in constants for t in c.tensors]
        fold: Fold = self.run.folds.get(key, tensors, make)
        return fold

    def _folded(self, fold: Fold) -> Tensor:
        operation: Callable[..., Tensor] = fold.operation
        if self.convolving is None:
            return operation([part.now() for part in self.parts], self.relu)
        affine, x = None, self.parts[0]
        if isinstance(x, FusedNode) and x.fits_convolution():
            affine, x = x._fold().operation, x.parts[0]
        residual = None if self.residual is None else self.residual.now()
        return operation(x.now(), residual, self.relu, affine)

    def _plain(self) -> Tensor:
        """As torch computes it, from the last value that is known."""
        base = self.base
        if base is None:
            parts = [part.now() for part in self.parts]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            last = self.convolving or self.norm
            return whole if last is None else last.plain(whole)
        value: Tensor = base._plain() if base.value is None else base.now()
        if self.relu:
            return value.relu()
        if self.norm is not base.norm:
            assert self.norm is not None
            return self.norm.plain(value)
        assert self.residual is not None
        return value + self.residual.now()


def _fuse(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let calls of these functions go to the decorated one, which may decline."""

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
    node = _images(run, x, weight, bias)
    shape = None if node is None else _convolved(node.shape, weight.shape, s, p, d, groups)
    if node is None or shape is None:
        return NotImplemented
    convolving = Convolving(weight, bias, s, p, d, groups)
    if isinstance(node, FusedNode) and node.is_affine and may_take_winograd(convolving):
        node.passed = True
    else:
        node.get()  # it is read for certain, and so stays a short way back
    return run.wait(FusedNode(run, (node,), shape, convolving))


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
    own = running_mean, running_var, weight, bias
    x = _images(run, input, *own)
    if x is None or any(t is not None and t.shape != x.shape[1:2] for t in own):
        return NotImplemented
    norm = Norm(*own, eps)
    node = x.then(norm) if isinstance(x, FusedNode) else None
    if node is not None:
        return run.wait(node)
    x.passed = True
    parts = _parts(x)
    for part in parts:
        part.get()
    return run.wait(FusedNode(run, parts, x.shape, norm=norm))


@_fuse(F.relu, torch.relu, Tensor.relu)
def _relu(run: Run, x: Any, inplace: bool = False, *rest: Any, **others: Any) -> Any:
    if type(x) is not Pending or rest or others:
        return NotImplemented
    new = x.node.then(relu=True) if isinstance(x.node, FusedNode) else None
    return NotImplemented if new is None else run.wait(new, x if inplace else None)


_fuse(F.relu_, torch.relu_, Tensor.relu_)(partial(_relu, inplace=True))


@_fuse(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(run: Run, a: Any, b: Any = None, *rest: Any, inplace: bool = False, **others: Any) -> Any:
    if rest or others:  # alpha, out
        return NotImplemented
    if inplace and (type(a) is not Pending or a.node.value is not None):
        return NotImplemented
    for x, other in ((b, a), (a, b)):
        node = x.node if type(x) is Pending else None
        if not isinstance(node, FusedNode) or not may_wait(other):
            continue
        residual = node_of(other)
        new = node.then(residual=residual) if _form(residual) == _form(node) else None
        if new is not None:
            return run.wait(new, a if inplace else None)
    return NotImplemented


_fuse(Tensor.__iadd__, Tensor.add_)(partial(_add, inplace=True))


@_fuse(torch.cat, torch.concat, torch.concatenate)
def _cat(run: Run, tensors: Any, dim: int = 0, *rest: Any, **others: Any) -> Any:
    if rest or others or dim not in (1, -3) or not isinstance(tensors, (tuple, list)):
        return NotImplemented
    if not any(type(t) is Pending for t in tensors) or not all(map(may_wait, tensors)):
        return NotImplemented
    parts: list[Node] = []
    for node in map(node_of, tensors):
        parts += _parts(node)
    n, *rest_of_shape = parts[0].shape
    forms = {(p.shape[:1], p.shape[2:], len(p.shape), p.dtype, p.device) for p in parts}
    if len(forms) > 1 or len(rest_of_shape) != 3 or len(parts) < 2:
        return NotImplemented
    shape = torch.Size((n, sum([p.shape[1] for p in parts]), *rest_of_shape[1:]))
    return run.wait(FusedNode(run, parts, shape))


def _parts(node: Node) -> Sequence[Node]:
    """The parts of a cat that waits; any other node is its only part."""
    if isinstance(node, FusedNode) and node.is_cat and node.value is None:
        return node.parts
    return (node,)


def _pass_on(
    function: Callable[..., Any], run: Run, x: Any, *args: Any, inplace: bool = False, **kwargs: Any
) -> Any:
    """Call a function, to which layout is the same, on values in that in which they are.

    It writes to nothing but what ``x`` alone waits for, so that what was put off may stay so.
    """
    given = [x, *args, *kwargs.values()]
    tensors = [t for t in given if isinstance(t, Tensor)]
    if type(x) is not Pending or not all(map(may_wait, tensors)):
        return NotImplemented
    if "out" in kwargs or not _may_wait_here(run, x.device.type):
        return NotImplemented
    nodes = [t.node for t in tensors if type(t) is Pending]
    if inplace and isinstance(x.node, FusedNode) and x.node.value is None and not x.node.passed:
        kwargs["inplace"] = True
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


def _images(run: Run, x: Any, *weights: Tensor | None) -> Node | None:
    """The node of images ``x`` if a function of them and ``weights`` may wait."""
    if not may_wait(x) or not _may_wait_here(run, x.device.type):
        return None
    node = node_of(x)
    fits = len(node.shape) == 4 and node.dtype.is_floating_point and 0 not in node.shape
    go_together = all(
        id(t) in run.known
        and not t.requires_grad
        and t.dtype == node.dtype
        and t.device == node.device
        for t in weights
        if t is not None
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
