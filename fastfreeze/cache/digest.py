"""What modules hold, told apart bit by bit."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.trimming.state import Watch
from fastfreeze.trimming.watch import Steps, checksum

_OWN = frozenset(vars(nn.Module())) | {"forward", "training"}
_SCALARS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_NAMED = (nn.Module, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
_CLASS_VALUES = (bool, int, float, str, tuple, list, dict)
_DEPTH = 6


class Holdings:
    """What some modules hold: parameters, buffers, attributes and what their classes define."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list({m: None for module in modules for m in module.modules()})
        self._places = [
            vars(m)[name] for m in self._modules for name in ("_parameters", "_buffers")
        ]
        self._attributes: Watch | None = None
        self._seen: Watch | None = None
        self._objects: list[Any] = []  # attributes that may change without being replaced
        self._state: Any = None
        self._pinned: list[Tensor] = []
        self._sums: list[int | None] = []
        self._turns: Iterator[int] = iter(())
        self._steps = Steps()
        self._digest = ""

    def digest(self) -> str:
        """Of all bits; computed anew when something has been written to or replaced.

        Writes that torch does not count are looked for where an optimizer has stepped while there
        were gradients, else in one tensor in each call.
        """
        if self._attributes is None or self._attributes.changed():
            held = [v for m in self._modules for k, v in vars(m).items() if k not in _OWN]
            self._objects = list({id(v): v for v in held if not _is_fixed(v)}.values())
            self._attributes = Watch([vars(m) for m in self._modules])
        tensors = [t for place in self._places for t in place.values() if t is not None]
        seen: set[int] = set()
        said = [describe(value, tensors, seen) for value in self._objects]
        classes = [_class_values(kind) for kind in dict.fromkeys(map(type, self._modules))]
        state = (said, classes, [(id(t), t.data_ptr(), t._version) for t in tensors])
        scalars = self._attributes
        same = state == self._state and scalars is self._seen
        if same and not self._was_written_to(tensors):
            return self._digest
        self._state, self._seen = state, scalars
        self._sums, self._turns = [checksum(t) for t in tensors], cycle(range(len(tensors)))
        self._steps.tensors, self._steps.seen = tensors, False
        digest = hashlib.blake2b(repr((said, classes, self._scalars())).encode(), digest_size=16)
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self._digest = digest.hexdigest()
        self._pinned = [alias for t in tensors for alias in (t, t.detach())]
        return self._digest

    def _was_written_to(self, tensors: Sequence[Tensor]) -> bool:
        self._steps.look()
        i = next(self._turns, None)
        return self._steps.seen or (i is not None and checksum(tensors[i]) != self._sums[i])

    def _scalars(self) -> list[Any]:
        return [
            (type(m).__qualname__, k, repr(v) if _is_fixed(v) else "")
            for m in self._modules
            for k, v in vars(m).items()
            if k not in _OWN
        ]


def _is_fixed(value: Any) -> bool:
    """Whether a value can only be replaced, not written to."""
    if isinstance(value, tuple):
        return all(isinstance(v, _SCALARS) for v in value)
    return isinstance(value, _SCALARS)


def describe(value: Any, tensors: list[Tensor], seen: set[int], depth: int = 0) -> Any:
    """A value in terms that can be compared and printed.

    Its tensors are added to ``tensors``; objects in ``seen`` are not described again.
    """
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor"
    if depth == _DEPTH or id(value) in seen or isinstance(value, _NAMED):
        return getattr(value, "__qualname__", type(value).__qualname__)
    seen.add(id(value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (tuple, list)):
        held: Any = enumerate(value)
    else:
        held = (value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).items()
    parts = [(repr(k), describe(v, tensors, seen, depth + 1)) for k, v in held]
    return [type(value).__qualname__, parts]


def _class_values(kind: type) -> Any:
    return [
        (name, repr(value))
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if not name.startswith("__")
        and isinstance(value, (bool, int, float, str, tuple, list, dict))
    ]


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
