"""What modules hold, told apart bit by bit."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        self._state: Any = None
        self._pinned: list[Tensor] = []
        self._digest = ""

    def digest(self) -> str:
        """Of all bits; computed anew when something has been written to or replaced."""
        tensors: list[Tensor] = []
        seen: set[int] = set()
        said: list[Any] = [self._said(m, tensors, seen) for m in self._modules]
        said += [_class_values(kind) for kind in dict.fromkeys(map(type, self._modules))]
        state = (said, [(id(t), t.data_ptr(), t._version) for t in tensors])
        if state == self._state:
            return self._digest
        digest = hashlib.blake2b(repr(said).encode(), digest_size=16)
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self._state, self._digest = state, digest.hexdigest()
        self._pinned = [alias for t in tensors for alias in (t, t.detach())]
        return self._digest

    def _said(self, module: nn.Module, tensors: list[Tensor], seen: set[int]) -> Any:
        held = vars(module)
        for name in ("_parameters", "_buffers"):
            tensors += [t for t in held[name].values() if t is not None]
        own = [(k, describe(v, tensors, seen)) for k, v in held.items() if k not in _OWN]
        return type(module).__qualname__, own


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
