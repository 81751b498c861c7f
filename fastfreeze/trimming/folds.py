"""Folded weights, kept while those that they were made of stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfreeze.trimming.compare import excess
from fastfreeze.trimming.operations import Convolution
from fastfreeze.trimming.watch import Contents, Steps

_MAX_CHANGES = 16
Key = tuple[Any, ...]


class Convolving(NamedTuple):
    """What torch's convolution of images is called with, but for the images."""

    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    @property
    def kernel_size(self) -> torch.Size:
        return self.weight.shape[2:]

    @property
    def out_channels(self) -> int:
        return len(self.weight)

    def plain(self, x: Tensor) -> Tensor:
        """What torch computes."""
        return F.conv2d(x, *self)

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:2] if t is not None]

    def key(self) -> Key:
        return *map(id, self[:2]), *self[2:]


class Norm(NamedTuple):
    """What torch's batch norm in eval mode is called with, but for the images."""

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

    def key(self) -> Key:
        return *map(id, self[:4]), self.eps

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
        refused: why it is not to be used; empty if it is.
    """

    def __init__(self, operation: Any, contents: Contents, refused: str) -> None:
        self.operation, self.contents, self.refused = operation, contents, refused
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
        exact: whether values that wait are computed as torch computes them.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self._folds: dict[Key, Fold] = {}
        self._changes: dict[Key, int] = {}
        self._turns: Iterator[Key] = cycle(())
        self._known: set[int] = set()
        self._steps = Steps()

    def __len__(self) -> int:
        return sum(not fold.refused for fold in self._folds.values())

    def refusals(self) -> list[str]:
        """Why some are not used, each reason once."""
        return sorted({fold.refused for fold in self._folds.values() if fold.refused})

    def get(self, key: Key, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Fold:
        """What ``make`` gives of ``tensors`` as they are; ``key`` has their ids."""
        found = self._folds.get(key)
        if found is not None:
            if found.contents.as_counted(tensors):
                return found
            self._drop(key)
        often = self._changes.get(key, 0) >= _MAX_CHANGES
        refused = "its weights change again and again" if often else ""
        with torch.inference_mode(False), torch.no_grad():
            operation = None if refused else make()
        found = self._folds[key] = Fold(operation, Contents(tensors), refused)
        self._look_anew()
        return found

    def check(self, known: set[int]) -> None:
        """Drop those whose weights hold other bits, or are not among those that are known.

        All after a step of an optimizer that may have moved them, else one in each call, in turn.
        """
        if known != self._known:
            self._known = known
            for key, fold in list(self._folds.items()):
                if not all(id(t) in known for t in fold.contents.tensors):
                    del self._folds[key]
            self._look_anew()
        if self._steps.seen():
            keys = list(self._folds)
        else:
            keys = [key for key in (next(self._turns, None),) if key is not None]
        for key in keys:
            if not self._folds[key].contents.as_compared():
                self._drop(key)
                self._look_anew()

    def _drop(self, key: Key) -> None:
        self._changes[key] = self._changes.get(key, 0) + 1
        del self._folds[key]

    def _look_anew(self) -> None:
        self._turns = cycle(list(self._folds))
        self._steps.tensors = [t for f in self._folds.values() for t in f.contents.tensors]


def folded(convolving: Convolving, norm: Norm | None) -> Convolution:
    """The convolution with the norm behind it in its weights."""
    weight = convolving.weight.detach().double()
    bias = None if convolving.bias is None else convolving.bias.detach().double()
    if norm is not None:
        scale, shift = norm.affine()
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return Convolution(convolving, weight, bias, convolving.weight.dtype)
