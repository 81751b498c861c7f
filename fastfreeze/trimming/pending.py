"""Values that are computed when something reads them.

A :class:`Pending` is a tensor whose :class:`Node` tells how to compute it. Its shape, dtype and
device are known at once. A :class:`Run` sees each of torch's functions that the model calls: a few
(``FUSED``) make another pending value of one. Before any other function runs, all that the fused
ones have put off is computed, and is a plain tensor in its place: nothing can be written to in
between.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

FUSED: dict[Any, Callable[..., Any]] = {}  # what makes a pending value, or gives NotImplemented

_METADATA = {  # reads and writes no values
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse"),
        "requires_grad",  # nothing that does waits
    )
} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
    *(Tensor.is_complex, Tensor.get_device, Tensor.element_size, Tensor.nelement),
    torch._assert,
}
_WRITING_METHODS = ("__setitem__", "__set__", "__array__", "__dlpack__")  # and __iadd__, ...
_SHARING = ("numpy", "data_ptr", "storage", "untyped_storage", "embedding")
_PLAIN = torch._C.DisableTorchFunctionSubclass


class TooLateError(BaseException):
    """What a pending value was to be computed from has been written to.

    No ``Exception``: the model's own handlers are not to see it.
    """


class Node:
    """What a pending value is computed from.

    Attributes:
        shape, dtype, device: of the value.
        value: once it is known, in the layout in which it was computed.
        moved: whether that is another one than the model would have given.
        passed: whether more has been done to it by a fused function.
        lock: for models whose forward reads a value in a thread of its own.
    """

    __slots__ = ("device", "dtype", "lock", "moved", "passed", "shape", "value", "version")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.value: Tensor | None = None
        self.version, self.moved, self.passed = 0, False, False
        self.lock = threading.RLock()

    def get(self) -> Tensor:
        """The value, for one who has it under this name and may write to it."""
        if self.value is None:
            with self.lock:
                if self.value is None:
                    self._set()
        assert self.value is not None
        return self.value

    def _set(self) -> None:
        """Compute the value."""
        raise NotImplementedError

    def now(self) -> Tensor:
        """The value that it had when it was asked for.

        Raises:
            TooLateError: it has been written to since.
        """
        self.get()
        return self.there()

    def there(self) -> Tensor:
        """The same of a value that is known, which this does not count as read."""
        if self.value is None or self.value._version != self.version:
            raise TooLateError
        return self.value


class Given(Node):
    """A tensor that is there already, to be read later."""

    __slots__ = ()

    def __init__(self, value: Tensor) -> None:
        super().__init__(value.shape, value.dtype, value.device)
        self.value, self.version = value, value._version


class Pending(Tensor):
    """A tensor that is computed when something reads it."""

    node: Node

    @staticmethod
    def of(node: Node) -> Pending:
        """A value of this node, which may wait until the present run ends."""
        pending = _wrapper(node)
        current_run().pending.append(weakref.ref(pending))
        return pending

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run, kwargs = LOCAL.run, kwargs or {}
        if run is not None:
            return run.call(func, types, args, kwargs)
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Pending, _value, (args, kwargs or {}))
        return func(*args, **kwargs)


class Run(TorchFunctionMode):
    """One call of a trimmed model; as a mode, it sees torch's functions.

    To look at each of them costs microseconds, so it is a mode only while frozen modules run in
    which something may wait (:meth:`watch`).

    Attributes:
        known: ids of the tensors that may be folded; found when it becomes a mode.
        may_watch, watches: whether it ever becomes one, and is one now.
        keeper: puts off calls of frozen modules, and functions of what they give; None for nothing.
        pending: values of the keeper's.
        waiting: values of fused functions, by the id of their nodes.
        own_modes: how many dispatch modes the keeper has switched on.
    """

    def __init__(
        self, folds: Any, find_known: Callable[[], set[int]] | None, keeper: Any = None
    ) -> None:
        super().__init__()
        self._find_known, self.may_watch = find_known, find_known is not None
        self.own_modes = 0
        self.watches = False
        self.folds, self.keeper = folds, keeper
        self.known: set[int] = set()
        self.pending: list[weakref.ref[Pending]] = []
        self.waiting: dict[int, weakref.ref[Pending]] = {}
        self._has_wrappers = keeper is not None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # traced as if this were not there
            return func(*args, **(kwargs or {}))
        return self.call(func, types, args, kwargs or {})

    def look(self) -> None:
        """Find what may be folded, and that what was is still right."""
        if self._find_known is not None:
            self.known, self._find_known = self._find_known(), None
            self.folds.check(self.known)

    @contextmanager
    def watch(self, closing: bool = True) -> Iterator[None]:
        """Functions may wait until this ends; if it is not ``closing`` their values are settled."""
        self.look()
        self.watches = True
        try:
            with self:
                yield
        finally:
            self.watches = False
            if closing:
                self.close()

    def call(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call one of torch's functions, or put it off."""
        is_pending = Pending in types
        if func in _METADATA:
            if not is_pending:
                return func(*args, **kwargs)
            with _PLAIN():
                return func(*args, **kwargs)
        if is_pending and self.keeper is not None:
            result = self.keeper.call_function(func, args, kwargs)
            if result is not NotImplemented:
                return result
        fused = FUSED.get(func) if self.watches else None
        if fused is not None and args:
            result = fused(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        self.close(not _may_write(func, args, kwargs))
        if is_pending and (self._has_wrappers or self.waiting):
            return _with_values(func, args, kwargs)
        return func(*args, **kwargs)

    def wait(self, node: Node, into: Pending | None = None) -> Pending:
        """A value of a fused function's node; ``into`` becomes it, if it is given."""
        pending = _wrapper(node) if into is None else into
        if into is not None:
            self.waiting.pop(id(into.node), None)
            into.node = node
        self.waiting[id(node)] = weakref.ref(pending)
        return pending

    def close(self, reads: bool = False) -> None:
        """Compute what fused functions have put off and anyone holds: plain from now on.

        Args:
            reads: leave what more has been done to: most likely it is held by a name, and not read.
        """
        left = [p for ref in self.waiting.values() if (p := ref()) is not None]
        held = [p for p in left if reads and p.node.passed and p.node.value is None]
        self.waiting = {id(p.node): weakref.ref(p) for p in held}
        for pending in [p for p in left if id(p.node) not in self.waiting]:
            if not _become_plain(pending):
                self._has_wrappers = True

    @contextmanager
    def anew(self) -> Iterator[None]:
        """As in a forward of its own: for what a keeper has put off."""
        outer, self.waiting = self.waiting, {}
        try:
            yield
            self.close()
        finally:
            self.waiting = outer

    def finish(self, output: Any) -> Any:
        """Compute what is still pending and held by anyone; these are plain tensors from now on."""
        self.close()
        left = [ref() for ref in self.pending]
        self.pending.clear()
        for pending in left:
            if pending is not None:
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
    with _PLAIN():
        has_gradient = value.requires_grad  # by a custom autograd function that it went through
    return value if has_gradient else _value(value)


def settled(values: Any) -> Any:
    """:func:`settle` for all tensors in nested containers."""
    return tree_map_only(Pending, settle, values)


def may_wait(value: Any) -> bool:
    """Whether it is a tensor that may be read later, and nothing is lost: no gradient above all."""
    if type(value) is Pending:
        known = value.node.value
        with torch._C.DisableTorchFunction():
            return not (value.requires_grad or (known is not None and known.requires_grad))
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    return plain and not (
        value.requires_grad or value.is_inference() or value.is_neg() or value.is_meta
    )


def node_of(value: Any) -> Node:
    """The node of a tensor as it is now."""
    return value.node if type(value) is Pending else Given(value)


def _wrapper(node: Node) -> Pending:
    pending: Pending = Tensor._make_wrapper_subclass(
        Pending, node.shape, dtype=node.dtype, device=node.device
    )
    torch._C._set_throw_on_mutable_data_ptr(pending)  # an error instead of a crash
    pending.node = node
    return pending


def _value(pending: Pending) -> Tensor:
    node = pending.node
    tensor = node.get()
    if node.moved:
        with torch._C.DisableTorchFunction():
            tensor = node.value = tensor.contiguous()
            node.version, node.moved = tensor._version, False
    return tensor


def _may_write(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function may write to a tensor that it is given, or let others do so."""
    name = getattr(func, "__name__", "_").partition(".")[0]
    if name.startswith("__"):
        return name.startswith("__i") or name in _WRITING_METHODS
    schema = getattr(func, "_schema", None)
    if name.endswith("_") or name in _SHARING or (schema is not None and schema.is_mutable):
        return True
    return bool("out" in kwargs or kwargs.get("inplace") or any(a is True for a in args))


def _with_values(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = settled(args), settled(kwargs)
    if not any(type(leaf) is Pending for leaf in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    with _PLAIN():
        return func(*args, **kwargs)


def _become_plain(pending: Pending) -> bool:
    """Whether a pending value is a plain tensor now, with the attributes that it was given."""
    if type(pending) is not Pending:
        return True
    value = _value(pending)
    alias = value.view_as(value) if value.requires_grad else value.detach()
    own = {name: held for name, held in vars(pending).items() if name != "node"}
    try:
        with torch._C.DisableTorchFunction():
            torch.utils.swap_tensors(pending, alias)
    except RuntimeError:  # others refer to it weakly, or in C++
        return False
    vars(pending).update(own)
    return True
