"""Whether tensors still hold what they held."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastfreeze.trimming.bits import checksum


class Contents:
    """Tensors as they are now; they and their memory are kept, so that no others get their ids.

    Attributes:
        tensors: the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], one_by_one: bool) -> None:
        self.tensors, self._memory = list(tensors), [t.detach() for t in tensors]
        self._counts, self._sums = _counts(tensors), [checksum(t) for t in tensors]
        self._last, self._turn, self._one_by_one = True, 0, one_by_one

    def lasts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are these, and nothing is known to have been written to them."""
        return self._last and _counts(tensors) == self._counts

    def compare(self, turn: bool) -> None:
        """Compare the bits with those of then: all, or those whose ``turn`` it is."""
        chosen = range(len(self.tensors))
        if turn and self._one_by_one and chosen:
            self._turn = (self._turn + 1) % len(chosen)
            chosen = range(self._turn, self._turn + 1)
        same = all(checksum(self.tensors[i]) == self._sums[i] for i in chosen)
        self._last = self._last and same


class Lookout:
    """Looks for writes to tensors that torch does not count.

    Optimizers move frozen tensors, too, while these have a gradient; fused ones do not count that.
    """

    _all: ClassVar[weakref.WeakSet[Lookout]] = weakref.WeakSet()
    _hooked = False

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[Contents] = weakref.WeakSet()
        self._turn, self._stepped = 0, False
        if not Lookout._hooked:
            Lookout._hooked = True
            register_optimizer_step_post_hook(Lookout._after_step)
        Lookout._all.add(self)

    def contents(self, tensors: Sequence[Tensor], one_by_one: bool = False) -> Contents:
        """Tensors as they are now, watched while what this gives is held.

        Args:
            one_by_one: compare one of them when it is their turn, not all.
        """
        new = Contents(tensors, one_by_one)
        self._watched.add(new)
        return new

    def look(self) -> None:
        """Compare all after a step of an optimizer that may have moved them, else in turn."""
        watched = list(self._watched)
        stepped, self._stepped = self._stepped or _have_gradients(watched), False
        self._turn = (self._turn + 1) % max(len(watched), 1)
        for contents in watched if stepped else watched[self._turn :][:1]:
            contents.compare(turn=not stepped)

    @staticmethod
    def _after_step(*_: Any) -> None:
        for lookout in Lookout._all:
            lookout._stepped = lookout._stepped or _have_gradients(lookout._watched)


def _have_gradients(watched: Iterable[Contents]) -> bool:
    return any(t.grad is not None for contents in watched for t in contents.tensors)


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(id(t), t.data_ptr(), t._version) for t in tensors]
