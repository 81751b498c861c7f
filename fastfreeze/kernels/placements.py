"""Whether tensors are still where they were, and laid out as they were: for plans of addresses."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfreeze.kernels import library
from fastfreeze.kernels.memory import Gaps

kind_of = attrgetter("layout", "dtype", "shape")
# Types whose memory is their own; None is for gradients.
PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)))
_NOTHING = frozenset((None,))


class Given:
    """Which parameters have a gradient, and whether all gradients are plain tensors.

    Attributes:
        flags: of each parameter, whether it has one.
        index: which have one, rising.
        plain: whether all are of torch's own types, which hold their memory themselves.
    """

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self.flags = [grad is not None for grad in grads]
        self.index = array("q", compress(range(len(grads)), self.flags))
        self._everyone = all(self.flags)
        self._types = list(map(type, self.of(grads)))
        self.plain = PLAIN.issuperset(self._types)

    def hold(self, grads: Sequence[Tensor | None], others: Iterable[Tensor | None]) -> bool:
        """Whether ``grads`` have the same types, in the same order, and ``others`` are all None."""
        return list(map(type, grads)) == self._types and _NOTHING.issuperset(others)

    def of(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values of the parameters that have one."""
        return values if self._everyone else list(compress(values, self.flags))

    def spread(self, values: Sequence[Any]) -> Sequence[Any]:
        """The inverse of :meth:`of`, None for the rest."""
        each = iter(values)
        return values if self._everyone else [next(each) if has else None for has in self.flags]


class Handle:
    """What C++ keeps for as long as this lives, by its number."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        make, free = (getattr(torch.ops.fastfreeze, name) for name in (kind, f"{kind}_free"))
        self.number: int = make.default(*arguments)
        weakref.finalize(self, free.default, self.number)


class Look:
    """Checks a plan's tensors before a step: in one call of C++, where the library is there.

    Args:
        params: the plan's, dense.
        written: what the step writes: no gradient may lie there.
    """

    def __init__(self, params: Sequence[Tensor], written: Sequence[Tensor | None]) -> None:
        self._places = list(map(place_of, params))
        self._sizes = [p.numel() * p.element_size() for p in params]
        # Without the parameters: while they are kept, torch.utils.swap_tensors refuses them.
        self._planned = Handle("placements", params, False) if has_library() else None
        self.watch([])
        self.keep_clear(written)

    def keep_clear(self, written: Sequence[Tensor | None]) -> None:
        """From now on, this is what the step writes."""
        self._gaps = Gaps(written)
        if self._planned is not None:
            tables = int64_table(self._gaps.stretches, 2), int64_table(self._sizes, 1)
            self._clear = Handle("gaps", *tables)

    def watch(self, state: Sequence[Tensor]) -> None:
        """From now on, these tensors of the state must not move."""
        self._state, self._state_places = state, list(map(place_of, state))
        if self._planned is not None:
            self._kept = Handle("placements", state, True)

    def hold(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters, each of them, are where they were."""
        return _are_at(self._places, params)

    def find(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> array[int] | None:
        """Addresses of the gradients, 0 for none; None if one is laid out unlike its parameter.

        The arguments are those of ``Plan.align``. Raises ValueError if something has moved, or a
        gradient lies in what the step writes.
        """
        if not given.plain or self._planned is None:
            return self._find_slowly(params, grads, given)
        addresses = array("q", bytes(8 * len(given.flags)))
        found = torch.ops.fastfreeze.placements_look.default(
            self._planned.number,
            self._kept.number,
            self._clear.number,
            params,
            grads,
            given.index.buffer_info()[0],
            addresses.buffer_info()[0],
        )
        if found == _AS_PLANNED:
            return addresses
        if found == _OTHER_GRADIENTS:
            return self._find_slowly(params, grads, given)
        raise ValueError(_MOVED_WORDS if found == _MOVED else _NOT_CLEAR_WORDS)

    def _find_slowly(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], given: Given
    ) -> array[int] | None:
        places = given.of(self._places)
        if not (_are_at(places, params) and _are_at(self._state_places, self._state)):
            raise ValueError(_MOVED_WORDS)
        if not self._gaps.hold(grads):
            raise ValueError(_NOT_CLEAR_WORDS)
        alike = [place_of(g)[1:] == place[1:] for g, place in zip(grads, places, strict=True)]
        if all(alike) and all(map(holds_values, grads)):
            return addresses_of(given.spread(grads))
        return None


def _are_at(places: Sequence[object], tensors: Sequence[Tensor]) -> bool:
    return list(map(place_of, tensors)) == places and all(map(holds_values, tensors))


# What fastfreeze::placements_look finds.
_AS_PLANNED, _MOVED, _OTHER_GRADIENTS = range(3)
_MOVED_WORDS = "a parameter or its state is not where it was"
_NOT_CLEAR_WORDS = "a gradient lies in the memory of a parameter or of its state"


def int64_table(rows: Sequence[Any], columns: int) -> Tensor:
    """For operators: int64 [n, columns]."""
    return torch.from_numpy(np.array(rows, np.int64).reshape(-1, columns))


def has_library() -> bool:
    return library.backends()["cpu"].available


def holds_values(tensor: Tensor) -> bool:
    """Whether a kernel finds the tensor's values at its address.

    Not those of a negated or conjugated view, of zeros by a flag, or of a subclass, which may
    compute them.
    """
    return (
        type(tensor) in PLAIN
        and tensor.layout == torch.strided
        and not (tensor.is_neg() or tensor.is_conj())
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """What is known of one tensor: its address, then how it is laid out."""
    strided = tensor.layout == torch.strided
    address = tensor.data_ptr() if strided else None
    # Strides of contiguous tensors may differ where they lead nowhere.
    strides = tensor.stride() if strided and not tensor.is_contiguous() else None
    return address, *kind_of(tensor), tensor.device, strides


def addresses_of(tensors: Sequence[Tensor | None]) -> array[int]:
    """Addresses of the tensors, 0 for None."""
    try:
        return array("q", map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # one is None
        return array("q", [0 if t is None else t.data_ptr() for t in tensors])
