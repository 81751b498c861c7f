"""Values that are computed when something reads them.

A :class:`Pending` is a tensor whose :class:`Node` tells how to compute it. Its shape, dtype and
device are known at once. A few functions (``FUSED``) make another pending value of one; anything
else that touches it, in Python or in C++, gets the real tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FUSED: dict[Any, Callable[..., Any]] = {}  # what makes a pending value, or gives NotImplemented

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse")
} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
    *(Tensor.is_complex, Tensor.get_device, Tensor.element_size, Tensor.nelement),
}
_PLAIN = torch._C.DisableTorchFunctionSubclass


class TooLateError(BaseException):
    """What a pending value was to be computed from has been written to; the call starts anew.

    No ``Exception``: the model's own handlers are not to see it.

    Attributes:
        reader: the stand-in that should not have waited; None if it is not known.
    """

    def __init__(self, reader: Any) -> None:
        super().__init__()
        self.reader = reader


class Node:
    """What a pending value is computed from.

    Attributes:
        shape, dtype, device: of the value.
        reader: the stand-in that would have to compute it at once if this turns out to be too late.
        value: once it is known, in the layout in which it was computed.
        moved: whether that is another one than its module would have given.
        lock: for models whose forward reads a value in a thread of its own.
    """

    __slots__ = ("device", "dtype", "lock", "moved", "reader", "shape", "value", "version")

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, reader: Any
    ) -> None:
        self.shape, self.dtype, self.device, self.reader = shape, dtype, device, reader
        self.value: Tensor | None = None
        self.version, self.moved, self.lock = 0, False, threading.RLock()

    def compute(self) -> Tensor:
        """The value; called once."""
        raise NotImplementedError

    def get(self) -> Tensor:
        """The value, for one who has it under this name and may write to it."""
        if self.value is None:
            with self.lock:
                if self.value is None:
                    self._set()
        assert self.value is not None
        return self.value

    def _set(self) -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                value = self.compute()
        else:
            value = self.compute()
        self.version, self.value = value._version, value

    def now(self) -> Tensor:
        """The value that it had when it was asked for.

        Raises:
            TooLateError: it has been written to since.
        """
        value = self.get()
        if value._version != self.version:
            raise TooLateError(self.reader)
        return value


class Given(Node):
    """A tensor that is there already, for a stand-in to read later."""

    __slots__ = ()

    def __init__(self, value: Tensor, reader: Any = None) -> None:
        super().__init__(value.shape, value.dtype, value.device, reader)
        self.value, self.version = value, value._version


class Pending(Tensor):
    """A tensor that is computed when something reads it."""

    node: Node

    @staticmethod
    def of(node: Node) -> Pending:
        """A value of this node, noted in the present run."""
        pending: Pending = Tensor._make_wrapper_subclass(
            Pending, node.shape, dtype=node.dtype, device=node.device
        )
        pending.node = node
        current_run().pending.append(weakref.ref(pending))
        return pending

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with _PLAIN():
                return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        run = LOCAL.run
        if run is not None and run.keeper is not None:
            result = run.keeper.call_function(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if run is not None and (fused := FUSED.get(func)) is not None:
            result = fused(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*settled(args), **settled(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*settled(args), **settled(kwargs or {}))


class Run:
    """One call of a trimmed model.

    Attributes:
        folds: the model's folded weights.
        restores: whether values are handed on in torch's usual layout.
        keeper: puts off calls of frozen modules, and functions of what they give; None for nothing.
        pending: all pending values that were made.
    """

    def __init__(self, folds: Any, restores: bool, keeper: Any = None) -> None:
        self.folds, self.restores, self.keeper = folds, restores, keeper
        self.pending: list[weakref.ref[Pending]] = []

    def finish(self, output: Any) -> Any:
        """Compute what is still pending and held by anyone; these are plain tensors from now on."""
        if self.keeper is not None:
            self.keeper.release()
        left = [p for p in (ref() for ref in self.pending) if p is not None]
        self.pending.clear()
        for pending in left:
            _become_plain(pending)
        return settle(output)


class _Local(threading.local):
    run: Run | None = None


LOCAL = _Local()


def current_run() -> Run:
    """The call that this thread is in; there is one."""
    assert LOCAL.run is not None
    return LOCAL.run


def settle(value: Any) -> Any:
    """The tensor that a pending value is; anything else as it is."""
    if type(value) is not Pending:
        return value
    node = value.node
    tensor = node.get()
    if node.moved and LOCAL.run is not None and LOCAL.run.restores:
        tensor = node.value = tensor.contiguous()
        node.version, node.moved = tensor._version, False
    return tensor


def settled(values: Any) -> Any:
    """:func:`settle` for all tensors in nested containers."""
    return tree_map_only(Pending, settle, values)


def node_of(value: Any, reader: Any = None) -> Node:
    """The node of a tensor as it is now, which ``reader`` may read later."""
    if type(value) is not Pending:
        return Given(value, reader)
    node: Node = value.node
    if node.value is None:
        return node
    given = Given(node.value, reader)
    given.moved = node.moved
    return given


def _become_plain(pending: Pending) -> None:
    value = settle(pending)
    alias = value.view_as(value) if value.requires_grad else value.detach()
    with suppress(RuntimeError), _PLAIN():  # where others refer to it weakly
        torch.utils.swap_tensors(pending, alias)
