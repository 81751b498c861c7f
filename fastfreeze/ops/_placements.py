"""Whether tensors are still where they were, and laid out as they were: for plans of addresses."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import ClassVar, cast

import torch
from torch import Tensor

from fastfreeze.ops import _library

kind_of = attrgetter("layout", "dtype", "shape")
# Types whose memory is their own; None is for gradients.
PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)))


class Placements:
    """Addresses, dtypes, shapes and strides of tensors, to compare others with at each step.

    Args:
        tensors: strided, of any device.
    """

    _keep: ClassVar[bool] = False

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._every = array("q", range(len(tensors)))
        self._handle: int | None = None
        if _has_library():
            self._handle = torch.ops.fastfreeze.placements(tensors, self._keep)
            weakref.finalize(self, torch.ops.fastfreeze.placements_free, self._handle)
        else:
            self._facts = [_facts_of(t) for t in tensors]
            self._addresses = addresses_of(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unmoved."""
        if self._handle is None:
            return (
                list(map(_facts_of, tensors)) == self._facts
                and all(map(holds_values, tensors))
                and addresses_of(tensors) == self._addresses
            )
        unmoved: bool = torch.ops.fastfreeze.placements_hold.default(self._handle, tensors)
        return unmoved

    def gather(self, tensors: Sequence[Tensor | None]) -> array[int] | None:
        """Addresses of tensors that differ in nothing else from those remembered, 0 for None.

        None if one does differ, or if its memory does not hold its values.
        """
        if not PLAIN.issuperset(map(type, tensors)):
            return None
        flags = given(tensors)
        index, present = self._every, cast("Sequence[Tensor]", tensors)
        if not all(flags):
            index = array("q", compress(self._every, flags))
            present = list(compress(present, flags))
        if self._handle is None:
            if any(
                _facts_of(t) != self._facts[i] or not holds_values(t)
                for i, t in zip(index, present, strict=True)
            ):
                return None
            return addresses_of(tensors)
        addresses = array("q", bytes(8 * len(tensors)))
        gathered = torch.ops.fastfreeze.placements_gather.default(
            self._handle, present, index.buffer_info()[0], addresses.buffer_info()[0]
        )
        return addresses if gathered else None


class KeptPlacements(Placements):
    """The same of tensors that are kept alive, and looked at in C++ alone.

    Not for parameters: while they are kept so, ``torch.utils.swap_tensors`` refuses them.
    """

    _keep: ClassVar[bool] = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._tensors = list(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, unmoved."""
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        if not same or self._handle is None:
            return same and super().hold(tensors)
        unmoved: bool = torch.ops.fastfreeze.placements_kept_hold.default(self._handle)
        return unmoved


def _has_library() -> bool:
    return _library.backends()["cpu"].available


def _facts_of(tensor: Tensor) -> tuple[object, ...]:
    """All but the address. Strides of contiguous tensors may differ where they lead nowhere."""
    strided = tensor.layout == torch.strided
    strides = tensor.stride() if strided and not tensor.is_contiguous() else None
    return (*kind_of(tensor), tensor.device, strides)


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
    """What Placements know of one tensor."""
    return tensor.data_ptr(), *_facts_of(tensor)


def given(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which of the tensors are there."""
    return list(map(is_not, tensors, repeat(None)))


def addresses_of(tensors: Sequence[Tensor | None]) -> array[int]:
    """Addresses of the tensors, 0 for None."""
    try:
        return array("q", map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # one is None
        return array("q", [0 if t is None else t.data_ptr() for t in tensors])
