"""Folded weights, kept while those that they were made of stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfreeze.trimming.compare import excess
from fastfreeze.trimming.operations import Convolution
from fastfreeze.trimming.pending import TooLateError
from fastfreeze.trimming.watch import Contents, Steps

_MAX_CHANGES = 16


class Norm(NamedTuple):
    """The tensors of a norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def plain(self, x: Tensor) -> Tensor:
        """What torch computes."""
        return F.batch_norm(x, *self[:4], training=False, eps=self.eps)

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel, in float64."""
        scale = (self.var.double() + self.eps).rsqrt()
        shift = -self.mean.double() * scale
        if self.weight is not None:
            scale, shift = scale * self.weight.double(), shift * self.weight.double()
        return scale, shift if self.bias is None else shift + self.bias.double()


class Fold:
    """Weights that were folded, and what they were made of.

    Attributes:
        operation: computes with them.
        checked: whether it has been found to give what torch gives.
        writes: how many writes torch had counted.
        refused: why it is not to be used; empty if it is.
    """

    def __init__(self, operation: Any, contents: Contents, writes: int, refused: str) -> None:
        self.operation, self.contents, self.refused = operation, contents, refused
        self.writes = writes
        self.checked = False

    def result(self, found: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
        """What ``found`` gives, once that has been found to be what ``plain`` gives, else that."""
        if self.refused:
            return plain()
        if self.checked:
            return found()
        value, expected = found(), plain()
        if not bool(expected.isfinite().all()):
            return expected  # nothing to compare by; the next call may do
        times = excess(value, expected)
        if times <= 1:
            self.checked = True
            return value
        self.refused = f"folding changes values by {times:.1e} times what rounding may"
        return expected


class Folds:
    """The folded weights of one model.

    Attributes:
        usable: whether values may wait at all.
        exact: whether they are computed as the modules compute them.
    """

    def __init__(self, exact: bool = False) -> None:
        self.usable, self.exact = True, exact
        self._folds: dict[tuple[int, int], Fold] = {}
        self._changes: dict[tuple[int, int], int] = {}
        self._turns: Iterator[tuple[int, int]] = cycle(())
        self._steps = Steps()

    def __len__(self) -> int:
        return sum(not fold.refused for fold in self._folds.values())

    def refusals(self) -> list[str]:
        """Why some are not used, each reason once."""
        return sorted({fold.refused for fold in self._folds.values() if fold.refused})

    def get(
        self,
        key: tuple[int, int],
        tensors: Sequence[Tensor],
        counts: int,
        reader: Any,
        make: Callable[[], Any],
    ) -> Fold:
        """What ``make`` gives of ``tensors``, as they were after ``counts`` writes.

        Raises:
            TooLateError: they have been written to since.
        """
        found = self._folds.get(key)
        late = writes_to(tensors) != counts
        known = found is not None and found.writes == counts and found.contents.are(tensors)
        if found is not None and known and (late or found.contents.as_counted()):
            return found
        if late:
            raise TooLateError(reader)
        if found is not None:
            self._drop(key)
        often = self._changes.get(key, 0) >= _MAX_CHANGES
        refused = "its weights change again and again" if often else ""
        with torch.inference_mode(False), torch.no_grad():
            operation = None if refused else make()
        found = self._folds[key] = Fold(operation, Contents(tensors), counts, refused)
        self._look_anew()
        return found

    def check(self) -> None:
        """Drop those whose weights hold other bits.

        All after a step of an optimizer that may have moved them, else one in each call, in turn,
        and the statistics of all.
        """
        self._steps.look()
        if self._steps.seen:
            self._steps.seen = False
            keys = list(self._folds)
        else:
            keys = [key for key in (next(self._turns, None),) if key is not None]
        for key in keys:
            if not self._folds[key].contents.as_compared():
                self._drop(key)
                self._look_anew()

    @contextmanager
    def as_modules_compute(self) -> Iterator[None]:
        """Fold nothing, but let values wait as ever."""
        before, self.exact = self.exact, True
        try:
            yield
        finally:
            self.exact = before

    def too_late(self, reader: Any) -> None:
        """Take a stand-in at its word from now on, whose input has been written to meanwhile."""
        if reader is None:
            self.usable = False
        else:
            reader.waits = False

    def clear(self) -> None:
        """Forget all: what is frozen has changed."""
        self._folds.clear()
        self._look_anew()

    def _drop(self, key: tuple[int, int]) -> None:
        self._changes[key] = self._changes.get(key, 0) + 1
        del self._folds[key]

    def _look_anew(self) -> None:
        self._turns = cycle(list(self._folds))
        self._steps.tensors = [t for f in self._folds.values() for t in f.contents.tensors]


def folded(module: nn.Conv2d, norm: Norm | None) -> Convolution:
    weight = module.weight.detach().double()
    bias = None if module.bias is None else module.bias.detach().double()
    if norm is not None:
        scale, shift = norm.affine()
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return Convolution(module, weight, bias, module.weight.dtype)


def writes_to(tensors: Sequence[Tensor]) -> int:
    """How many writes torch has counted."""
    return sum([t._version for t in tensors])
