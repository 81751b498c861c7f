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
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.Size),
)
_NAMED = (nn.Module, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
_CLASS_VALUES = (bool, int, float, str, tuple, list, dict)
_DEPTH = 6


class Holdings:
    """What some modules hold: parameters, buffers, attributes and what their classes define."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self._all: list[nn.Module] = []  # with what is in them
        self._classes: list[type] = []
        self._names: Watch | None = None  # of all that is held by a name
        self._places: list[dict[str, Any]] = []  # of parameters and buffers
        self._objects: list[Any] = []  # where attributes are that may be written to, and they
        self._state: Any = None
        self._pinned: list[Tensor] = []  # so that no other tensor gets an address
        self._sums: list[int | None] = []
        self._turns: Iterator[int] = iter(())
        self._steps = Steps()
        self._digest = ""

    def digest(self) -> str:
        """Of all bits; computed anew when something has been written to or replaced.

        Writes that torch does not count are looked for where an optimizer has stepped while there
        were gradients, else in one tensor in each call.
        """
        replaced = self._replaced()
        if replaced:
            self._list()
        tensors = [t for d in self._places for t in d.values() if t is not None]
        seen: set[int] = set()
        said = [describe(value, tensors, seen) for *_, value in self._objects]
        places = [t.data_ptr() for t in tensors]
        state = said, [*map(id, tensors)], places, [t._version for t in tensors]
        if not replaced and state == self._state and not self._was_written_to(tensors):
            return self._digest
        self._state = state
        self._sums, self._turns = [checksum(t) for t in tensors], cycle(range(len(tensors)))
        self._steps.tensors, self._steps.seen = tensors, False
        self._pinned = [alias for t in tensors for alias in (t, t.detach())]
        names = [(a, b, repr(v) if _is_fixed(v) else "") for _, a, b, v in self._attributes()]
        digest = hashlib.blake2b(repr((said, names)).encode(), digest_size=16)
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self._digest = digest.hexdigest()
        return self._digest

    def _replaced(self) -> bool:
        """Whether something that is held by a name is another one, or perhaps only as great."""
        if self._names is None or self._names.changed():
            return True
        return any(d.get(name) is not value for d, name, value in self._objects)

    def _list(self) -> None:
        self._all = list({m: None for module in self.modules for m in module.modules()})
        bases = dict.fromkeys(base for m in self._all for base in type(m).__mro__)
        self._classes = [base for base in bases if not base.__module__.startswith("torch.")]
        self._objects = [(d, b, v) for d, _, b, v in self._attributes() if not _is_fixed(v)]
        own: list[Any] = [
            d for m in self._all for d in (vars(m), m._modules, m._parameters, m._buffers)
        ]
        self._places = [d for m in self._all for d in (m._parameters, m._buffers) if d]
        own += map(vars, self._classes)
        self._names = Watch(own)

    def _was_written_to(self, tensors: Sequence[Tensor]) -> bool:
        self._steps.look()
        i = next(self._turns, None)
        return self._steps.seen or (i is not None and checksum(tensors[i]) != self._sums[i])

    def _attributes(self) -> Iterator[tuple[Mapping[str, Any], str, str, Any]]:
        """Where they are, the name of whose they are, their own, and they."""
        for module in self._all:
            for name, value in vars(module).items():
                if name not in _OWN:
                    yield vars(module), type(module).__qualname__, name, value
        for kind in self._classes:
            for name, value in vars(kind).items():
                if not name.startswith("__") and isinstance(value, _CLASS_VALUES):
                    yield vars(kind), kind.__qualname__, name, value


def _is_fixed(value: Any) -> bool:
    """Whether a value can only be replaced, not written to."""
    if isinstance(value, tuple):
        return all(isinstance(v, _SCALARS) for v in value)
    return isinstance(value, _SCALARS)


def describe(value: Any, tensors: list[Tensor], seen: set[int], depth: int = 0) -> Any:
    """A value in terms that can be compared and printed.

    Its tensors are added to ``tensors``; objects in ``seen`` are not described again.
    """
    if isinstance(value, _SCALARS) or (type(value) is list and _is_fixed(tuple(value))):
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


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
