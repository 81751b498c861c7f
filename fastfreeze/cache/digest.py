"""What modules hold, told apart bit by bit."""

from __future__ import annotations

import hashlib
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import _lru_cache_wrapper, cached_property, lru_cache, partial
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from fastfreeze.trimming.bits import bits
from fastfreeze.trimming.state import HOOKS
from fastfreeze.trimming.watch import Contents, Lookout

_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"} | {"forward"}
_FIXED = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout, np.dtype),
)
_SEQUENCES = (tuple, list, set, frozenset, deque)
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property, cached_property)
_ABC = "_abc_impl"
_WORD = 8  # bytes


class UnsureError(Exception):
    """Something is held whose content cannot be seen; the message says where."""


class Holdings:
    """All that a module and what is in it hold, and the code that they run.

    Attributes:
        module: whose they are.
        problem: what cannot be seen; such a module is not to be put off.
    """

    def __init__(self, module: nn.Module, lookout: Lookout) -> None:
        self.module, self.problem = module, ""
        self._lookout = lookout
        self._hooks: list[Any] = []
        self._live: list[Any] = []  # what `_now` gave
        self._tensors: list[Tensor] = []  # parameters, buffers, and others that are held
        self._contents: Contents | None = None
        self._text = self._bits = ""

    def digest(self) -> tuple[str, str]:
        """Of all but the tensors' bits, and of these, with dtypes, shapes and strides.

        They are computed anew when something was replaced, or was found to be written to.
        """
        if not self.problem and self._has_changed():
            try:
                self._list()
            except UnsureError as error:
                self.problem = f"{type(self.module).__name__}{error}"
        if self.problem:
            return "", ""
        if self._contents is None or not self._contents.lasts(self._tensors):
            self._contents = self._lookout.contents(self._tensors, one_by_one=True)
            self._bits = _digest_of(self._tensors)
        return self._text, self._bits

    def has_hooks_inside(self) -> bool:
        """Whether something in the module has hooks; its own are called as ever."""
        return any(self._hooks)

    def _has_changed(self) -> bool:
        """Whether an entry of something that is held is another object, or an array other bits."""
        if not self._live:
            return True
        try:
            same = [*map(len, self._containers)] == self._lengths
            return not (
                same
                and all(map(is_, self._now(), self._live))
                and all(_content(array) == seen for array, seen in self._arrays)
            )
        except (RuntimeError, ValueError):  # changes while it is looked at, a cell is empty
            return True

    def _now(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(self._containers),
            chain.from_iterable(map(methodcaller("values"), self._dicts)),
            (read() for read in self._reads),
        )

    def _list(self) -> None:
        inside = list(self.module.modules())
        self._inside, self._seen = set(inside), dict[int, tuple[int, Any]]()
        self._hooks = [vars(m)[kind] for m in inside[1:] for kind in HOOKS]
        self._containers: list[Any] = []
        self._dicts: list[Any] = []
        self._reads: list[Callable[[], Any]] = [partial(type, m) for m in inside]
        self._arrays: list[tuple[Any, bytes]] = []
        self._tensors = []
        text = repr(self._describe(self.module, "")).encode()
        self._text = hashlib.blake2b(text, digest_size=16).hexdigest()
        self._seen.clear()
        self._lengths, self._live = [*map(len, self._containers)], [*self._now()]

    def _describe(self, value: Any, path: str) -> Any:  # noqa: PLR0911
        """A value in terms that can be compared and printed; all that is in it is watched.

        Raises:
            UnsureError: it is of a kind that may change unseen.
        """
        kind = type(value)
        if kind in _FIXED:
            return repr(value)
        if isinstance(value, Enum):
            return f"{kind.__qualname__}.{value.name}"
        if isinstance(value, (type, *_BUILT_IN, OpOverload, OpOverloadPacket, types.ModuleType)):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
        if isinstance(value, np.generic):
            return str(value.dtype), value.tobytes()
        if id(value) in self._seen:
            return self._seen[id(value)][0]
        self._seen[id(value)] = len(self._seen), value
        for kinds, describe in _KINDS:
            if isinstance(value, kinds):
                return kind.__qualname__, describe(self, value, path)
        return kind.__qualname__, self._object(value, path)

    def _tensor(self, value: Tensor, path: str) -> Any:
        plain = type(value) in (Tensor, nn.Parameter)
        if not plain or value.layout is not torch.strided or value.is_meta:
            raise UnsureError(
                f"{path} is a {type(value).__name__}, or has no values that lie apart"
            )
        self._tensors.append(value)
        return len(self._tensors)

    def _array(self, value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise UnsureError(f"{path} is an array of objects")
        self._arrays.append((value, _content(value)))
        return str(getattr(value, "dtype", "")), getattr(value, "shape", ()), _content(value)

    def _dict(self, value: Any, path: str) -> Any:
        self._watch(value)
        items = value.items()
        return [(self._describe(k, path), self._describe(v, f"{path}[{k!r}]")) for k, v in items]

    def _sequence(self, value: Any, path: str) -> Any:
        self._containers.append(value)
        parts = [self._describe(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return sorted(parts, key=repr) if isinstance(value, (set, frozenset)) else parts

    def _module(self, module: nn.Module, path: str) -> Any:
        if module not in self._inside:
            raise UnsureError(f"{path} is a module outside of it")
        parts = self._attributes(vars(module), path, _OWN)
        forward: Any = vars(module).get("forward")
        while type(forward).__module__.startswith("fastfreeze.trimming."):  # a stand-in
            forward = getattr(forward, "_forward", None) or forward.forward
        if forward is None or getattr(forward, "__self__", None) is module:
            forward = type(module).forward
        self._watch_attribute(type(module), "forward")
        parts.append(self._describe(forward, f"{path}.forward"))
        bases = [b for b in type(module).__mro__ if not b.__module__.startswith("torch.")]
        return parts, [self._class(base, path) for base in bases if base is not object]

    def _attributes(self, own: Any, path: str, without: Any = ()) -> list[Any]:
        self._watch(own)
        return [(k, self._describe(v, f"{path}.{k}")) for k, v in own.items() if k not in without]

    def _watch(self, own: Any) -> None:
        self._containers.append(own)
        self._dicts.append(own)

    def _watch_attribute(self, owner: Any, name: str) -> None:
        self._reads.append(partial(getattr, owner, name, None))

    def _class(self, kind: type, path: str) -> Any:
        if id(kind) in self._seen:
            return self._seen[id(kind)][0]
        self._seen[id(kind)] = len(self._seen), kind
        self._watch(vars(kind))
        parts = []
        for name, value in vars(kind).items():
            is_function = isinstance(value, _FUNCTIONS)
            if is_function or not (name.startswith("__") or isinstance(value, _DESCRIPTORS)):
                try:
                    parts.append((name, self._describe(value, f"{path}.{name}")))
                except UnsureError:  # what decorators hold does not count
                    if not is_function and name != _ABC:
                        raise
        return parts

    def _function(self, function: Any, path: str) -> Any:
        """Its code, what that is bound to, and the plain values and functions that it names."""
        name = f"{function.__module__}.{function.__qualname__}"
        if name.startswith("torch."):
            return name
        parts = [name, code_of(function.__code__)]
        for owner, attribute in (
            *((function, name) for name in ("__code__", "__defaults__", "__kwdefaults__")),
            *((cell, "cell_contents") for cell in function.__closure__ or ()),
        ):
            try:
                value = getattr(owner, attribute)
            except ValueError:  # an empty cell
                continue
            self._watch_attribute(owner, attribute)
            if attribute != "__code__":
                parts.append(self._describe(value, f"{path}.{attribute}"))
        return [*parts, *self._named(function, path)]

    def _named(self, function: Any, path: str) -> Iterator[Any]:
        own = function.__globals__
        for name in names_in(function.__code__):
            value = own.get(name)
            near = isinstance(value, types.FunctionType) and _are_near(value, function)
            if near or isinstance(value, (*_FIXED, np.generic, *_SEQUENCES, dict)):
                try:
                    part = self._describe(value, f"{path}.{name}")
                except UnsureError:  # of what happens to be near, the rest counts
                    part = ""
                self._reads.append(partial(own.get, name))
                yield name, part

    def _object(self, value: Any, path: str) -> Any:
        """Something of a class that is written in Python, with nothing but its attributes."""
        kind = type(value)
        names = [
            name
            for base in kind.__mro__
            for name, slot in vars(base).items()
            if isinstance(slot, types.MemberDescriptorType)
        ]
        extra = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
        if kind.__dictoffset__ < 0:  # in front of the object
            extra = int(kind.__weakrefoffset__ > 0)
        plain = kind.__basicsize__ <= object.__basicsize__ + _WORD * (len(names) + extra)
        plain = plain or isinstance(value, types.SimpleNamespace)
        if not plain or kind.__itemsize__ or not (names or hasattr(value, "__dict__")):
            raise UnsureError(f"{path} is a {kind.__name__}, which may change unseen")
        parts = []
        for name in names:
            self._watch_attribute(value, name)
            parts.append(self._describe(getattr(value, name, None), f"{path}.{name}"))
        return parts, self._attributes(vars(value), path) if hasattr(value, "__dict__") else ()


_KINDS: Sequence[tuple[Any, Any]] = (
    (Tensor, Holdings._tensor),
    (nn.Module, Holdings._module),
    ((np.ndarray, bytearray), Holdings._array),
    (dict, Holdings._dict),
    (_SEQUENCES, Holdings._sequence),
    (types.FunctionType, Holdings._function),
    (types.MethodType, lambda s, v, p: [s._describe(x, p) for x in (v.__func__, v.__self__)]),
    (partial, lambda s, v, p: [s._describe(x, p) for x in (v.func, v.args, v.keywords)]),
    (slice, lambda s, v, p: [s._describe(x, p) for x in (v.start, v.stop, v.step)]),
    ((staticmethod, classmethod), lambda s, v, p: s._describe(v.__func__, p)),
    (property, lambda s, v, p: [s._describe(x, p) for x in (v.fget, v.fset)]),
    (cached_property, lambda s, v, p: s._describe(v.func, p)),
    (_lru_cache_wrapper, lambda s, v, p: s._describe(v.__wrapped__, p)),
    (weakref.ref, lambda s, v, p: s._describe(v(), p)),
)


def _are_near(a: Any, b: Any) -> bool:
    """Whether two functions are of one package."""
    return bool(a.__module__.partition(".")[0] == b.__module__.partition(".")[0])


@lru_cache(maxsize=4096)
def code_of(code: types.CodeType) -> str:
    """A digest of what code does, the same in every process."""
    parts = [_constant(c) for c in code.co_consts]
    text = repr((code.co_code, parts, code.co_names, code.co_varnames, code.co_freevars))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return code_of(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_constant(v) for v in value]
        return sorted(parts, key=repr) if isinstance(value, frozenset) else parts
    return repr(value)


@lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Names that code and the functions in it use, globals among them."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in names_in(c)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _content(array: Any) -> bytes:
    content: bytes = array.tobytes() if isinstance(array, np.ndarray) else bytes(array)
    return content


def _digest_of(tensors: Sequence[Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        total.update(bits(tensor.cpu()).numpy().data if tensor.numel() else b"")
    return total.hexdigest()
