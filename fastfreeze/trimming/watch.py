"""Whether tensors still hold what they held."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Contents:
    """Tensors as they are now; both they and their memory are kept.

    Attributes:
        tensors: the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._memory = [t.detach() for t in tensors]  # nothing else can get its address
        self._counted = _counts(tensors)
        self._sums = [checksum(t) for t in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are they."""
        return all(a is b for a, b in zip(tensors, self.tensors, strict=True))

    def as_counted(self) -> bool:
        """Whether torch has counted no write to them, and they lie where they lay."""
        return _counts(self.tensors) == self._counted

    def as_compared(self) -> bool:
        """Whether they hold the same bits."""
        return [checksum(t) for t in self.tensors] == self._sums


class Steps:
    """Whether an optimizer has stepped while some tensors had gradients.

    Frozen tensors with a gradient are still moved, and fused optimizers do not count their writes.

    Attributes:
        tensors: that are watched.
        seen: set then; to be reset by whoever has looked at the tensors.
    """

    _all: ClassVar[weakref.WeakSet[Steps]] = weakref.WeakSet()
    _hooked = False

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.seen = False
        if not Steps._hooked:
            Steps._hooked = True
            register_optimizer_step_post_hook(Steps._stepped)
        Steps._all.add(self)

    @staticmethod
    def _stepped(*_: Any) -> None:
        for steps in Steps._all:
            steps.look()

    def look(self) -> None:
        """See whether one of the tensors has a gradient now."""
        self.seen = self.seen or any(t.grad is not None for t in self.tensors)


def checksum(tensor: Tensor) -> int | None:
    """Of a tensor's bits; None where it has none at hand, or a device would be waited for."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    # Sums of rows and of columns, each times a number of its own: they tell where a word is.
    width = math.isqrt(len(words)) or 1
    rest = len(words) % width
    table = words[: len(words) - rest].view(-1, width)
    sums = [table.sum(i, dtype=torch.int64) for i in (0, 1)]
    sums.append(words[len(words) - rest :].to(torch.int64))
    return int((torch.cat(sums) * _factors(sum(map(len, sums)))).sum())


@lru_cache(maxsize=256)
def _factors(count: int) -> Tensor:
    """Odd numbers."""
    x = torch.arange(1, count + 1, device="cpu") * -0x61C8864680B583EB
    return (x ^ (x >> 29)) * 0x40A7B892E31B1A47 | 1


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors]
