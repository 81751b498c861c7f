"""Whether tensors still hold what they held."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastfreeze.trimming.bits import checksum


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

    def as_counted(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are they, lie where they lay, and torch has counted no write to them."""
        return _counts(tensors) == self._counted

    def as_compared(self, i: int | None = None) -> bool:
        """Whether they hold the same bits; of one, or of all."""
        chosen = range(len(self.tensors)) if i is None else [i]
        return all(checksum(self.tensors[k]) == self._sums[k] for k in chosen)


class Steps:
    """Whether an optimizer has stepped while some tensors had gradients.

    Frozen tensors with a gradient are still moved, and fused optimizers do not count their writes.

    Attributes:
        tensors: that are watched.
    """

    _all: ClassVar[weakref.WeakSet[Steps]] = weakref.WeakSet()
    _hooked = False

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen = False
        if not Steps._hooked:
            Steps._hooked = True
            register_optimizer_step_post_hook(Steps._stepped)
        Steps._all.add(self)

    @staticmethod
    def _stepped(*_: Any) -> None:
        for steps in Steps._all:
            steps._look()

    def seen(self) -> bool:
        """Whether one has since the last question, or may do so by gradients that are there."""
        self._look()
        seen, self._seen = self._seen, False
        return seen

    def _look(self) -> None:
        self._seen = self._seen or any(t.grad is not None for t in self.tensors)


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(id(t), t.data_ptr(), t._version) for t in tensors]
