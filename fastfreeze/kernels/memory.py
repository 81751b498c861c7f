"""Which tensors share memory: a kernel takes many at once, so that none may lie in another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    """Indices of the members that have a tensor in the memory of another, be it their own.

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
    """

    def __init__(self, written: Sequence[Tensor | None]) -> None:
        self.stretches = sorted(s for s in map(stretch_of, written) if s is not None)
        highest = np.iinfo(np.int64).max
        self._begins = np.array([begin for begin, _ in self.stretches] + [highest], np.int64)
        ends = np.array([0] + [end for _, end in self.stretches], np.int64)
        self._ends = np.maximum.accumulate(ends)

    def hold(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these gradients, of any layout, are outside."""
        found = np.array([s for s in map(stretch_of, grads) if s is not None], np.int64)
        begins, ends = found.reshape(-1, 2).T
        gap = np.searchsorted(self._begins, begins, side="right")
        return bool(((self._ends[gap] <= begins) & (ends <= self._begins[gap])).all())
