"""Which tensors share memory: a kernel takes many at once, so that none may lie in another."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Stretch = tuple[int, int]  # addresses of the first byte and of the one behind the last


def stretch_of(tensor: Tensor | None) -> Stretch | None:
    """The memory between a tensor's first and last element; None if it has none of its own."""
    if tensor is None or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # a subclass without memory
        return None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (begin, begin + (last + 1) * tensor.element_size()) if begin else None


def sharing(members: Sequence[Sequence[Tensor | None]]) -> set[int]:
    """Indices of the members of which a tensor lies where another one, or another member's, does.

    What lies between the elements of a strided tensor counts as its own.
    """
    found = sorted(
        (stretch, i)
        for i, tensors in enumerate(members)
        for stretch in map(stretch_of, tensors)
        if stretch is not None
    )
    shared: set[int] = set()
    end, last = 0, -1
    for stretch, i in found:
        if stretch[0] < end:
            shared |= {i, last}
        if stretch[1] > end:
            end, last = stretch[1], i
    return shared


class Gaps:
    """Tells whether gradients lie outside of the memory that a step writes.

    Args:
        written: what the step writes.
        params: whose gradients are asked about.
    """

    def __init__(self, written: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        found = sorted(s for s in map(stretch_of, written) if s is not None)
        highest = np.iinfo(np.int64).max
        self._begins = np.array([begin for begin, _ in found] + [highest], np.int64)
        ends = np.array([0] + [end for _, end in found], np.int64)
        self._ends = np.maximum.accumulate(ends)
        self._sizes = np.array([p.numel() * p.element_size() for p in params], np.int64)
        # The gap in which each was last: most stay there, and need not be searched for.
        self._low = np.zeros(len(params), np.int64)
        self._high = np.zeros(len(params), np.int64)
        self._outside: array[int] | None = None  # addresses found so last

    def hold_addresses(self, addresses: array[int]) -> bool:
        """Whether dense gradients at these addresses, 0 for none, are outside."""
        if addresses == self._outside:
            return True
        begins = np.frombuffer(addresses, np.int64)
        if not self._hold(begins, begins + self._sizes * (begins != 0)):
            return False
        self._outside = addresses
        return True

    def hold(self, grads: Sequence[Tensor | None]) -> bool:
        """The same of any gradients."""
        stretches = np.array([stretch_of(g) or (0, 0) for g in grads], np.int64).reshape(-1, 2)
        return self._hold(stretches[:, 0], stretches[:, 1])

    def _hold(self, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> bool:
        if self._are_between(begins, ends):
            return True
        begins, ends = begins * (begins < ends), ends * (begins < ends)  # the empty are nowhere
        gap = np.searchsorted(self._begins, begins, side="right")
        self._low, self._high = self._ends[gap], self._begins[gap]
        return self._are_between(begins, ends)

    def _are_between(self, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> bool:
        return bool(((self._low <= begins) & (ends <= self._high)).all())
