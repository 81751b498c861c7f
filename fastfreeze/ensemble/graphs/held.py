"""What a traced model holds and reads, and whether a run has changed it."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastfreeze.layers.execution import Snapshot
from fastfreeze.trimming.state import Watch

_MISSING = object()
_SCALARS = (bool, int, float, complex, str, bytes)


def autocasts(values: Sequence[Any]) -> bool:
    """Whether autocast is on, on a device of a tensor among ``values``."""
    return any(torch.is_autocast_enabled(v.device.type) for v in values if isinstance(v, Tensor))


class Held:
    """Parameters and buffers under the names by which modules hold them.

    Args:
        modules: whose own, and whose submodules', are meant.

    Attributes:
        modules: these and their submodules, each once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list({m: None for module in modules for m in module.modules()})
        owners = [d for m in self.modules for d in (m._parameters, m._buffers)]
        self._places = [(d, name) for d in owners for name in d]

    def tensors(self) -> list[Tensor]:
        """What is there now."""
        found = [d.get(name) for d, name in self._places]
        return [t for t in found if t is not None]

    def states(self) -> list[tuple[int, int, int]] | None:
        """What changes when a tensor is written to or replaced; None for tensors without memory."""
        try:
            return [(id(t), t.data_ptr(), t._version) for t in self.tensors()]
        except RuntimeError:  # of torch.func's transforms, or fake
            return None


class HeldState:
    """What modules held at a moment, and their attributes and submodules.

    The tensors and their memory are kept: no others can get their ids and addresses.
    """

    def __init__(self, held: Held) -> None:
        self._held, self._states = held, held.states()
        tensors = [] if self._states is None else held.tensors()
        self._pinned = [alias for t in tensors for alias in (t, t.detach())]
        owners = [d for module in held.modules for d in (vars(module), module._modules)]
        self._attributes = Watch(owners)

    def lasts(self) -> bool:
        """Whether nothing has been written to or replaced since; False if that cannot be told."""
        same = self._states is not None and self._held.states() == self._states
        return same and not self._attributes.changed()


class AttributeReads:
    """The attributes that modules' Python reads while recorded, and their values then.

    A write into an attribute's value is noticed if the value is a list, dict or set.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        every_modules = set(dir(nn.Module())) - {"training", "forward"}

        def record(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in every_modules:
                attributes = object.__getattribute__(module, "__dict__")
                seen = attributes.get(name, _MISSING)
                seen = copy.copy(seen) if type(seen) in (list, dict, set) else seen
                self._seen.setdefault((id(attributes), name), (attributes, seen))
            return value

        nn.Module.__getattribute__ = record  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def changed(self) -> bool:
        try:
            return any(
                (now := attributes.get(name, _MISSING)) is not seen and now != seen
                for (_, name), (attributes, seen) in self._seen.items()
            )
        except (RuntimeError, TypeError, ValueError):  # two tensors or arrays have no single truth
            return True


def changed(snapshot: Snapshot) -> str:
    """What has changed, buffers' values aside; empty if nothing has."""
    if random.getstate() != snapshot.python:
        return "draws from Python's random"
    if pickle.dumps(np.random.get_state()) != pickle.dumps(snapshot.numpy):
        return "draws from numpy.random"
    for owner, d, seen in snapshot.owners:
        for name in d.keys() | seen.keys():
            if name not in d or name not in seen or not _same(d[name], seen[name]):
                return f"assigns {owner}.{name}"
    for name, value, seen in snapshot.containers:
        if len(value) != len(seen) or any(map(_differ, _items(value), _items(seen))):
            return f"changes {name}"
    return ""


def _items(value: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else value


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) != len(b) or any(map(_differ, a, b))
    return not _same(a, b)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _SCALARS) and a == b)
