"""Folded weights, kept while those that they were made of stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfreeze.trimming.compare import excess
from fastfreeze.trimming.operations import Convolution
from fastfreeze.trimming.pending import TooLateError
from fastfreeze.trimming.watch import Contents, Lookout

_MAX_CHANGES = 16
Key = tuple[Any, ...]


class Constants:
    """What one of torch's functions of images was called with, and its tensors as they were then.

    Attributes:
        tensors: which.
        key: what tells this call from others.
    """

    def __post_init__(self) -> None:
        given = list(vars(self).values())
        self.tensors = [v for v in given if isinstance(v, Tensor)]
        self.key: Key = tuple([id(v) if isinstance(v, Tensor) else v for v in given])
        self._versions = self._now()

    def check(self) -> None:
        """See that the tensors are as they were.

        Raises:
            TooLateError: they are not.
        """
        if self._now() != self._versions:
            raise TooLateError

    def plain(self, x: Tensor) -> Tensor:
        """What torch computes of images ``x``."""
        raise NotImplementedError

    def _now(self) -> list[int]:
        return [t._version for t in self.tensors if not t.is_inference()]


@dataclass(eq=False)
class Convolving(Constants):
    """A call of torch's convolution of images, with pairs for stride, padding and dilation."""

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
        how = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(x, self.weight, self.bias, *how)

    def folded(self, norm: Norm | None) -> Convolution:
        """With the norm behind it in its weights."""
        weight = self.weight.detach().double()
        bias = None if self.bias is None else self.bias.detach().double()
        if norm is not None:
            weight, bias = norm.behind(weight, bias)
        return Convolution(self, weight, bias)


@dataclass(eq=False)
class Norm(Constants):
    """A call of torch's batch norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def plain(self, x: Tensor) -> Tensor:
        own = self.mean, self.var, self.weight, self.bias
        return F.batch_norm(x, *own, training=False, eps=self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel, in float64."""
        scale = (self.var.double() + self.eps).rsqrt()
        shift = -self.mean.double() * scale
        if self.weight is not None:
            scale, shift = scale * self.weight.double(), shift * self.weight.double()
        return scale, shift if self.bias is None else shift + self.bias.double()

    def behind(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution with this norm behind it; all float64."""
        scale, shift = self.affine()
        bias = shift if bias is None else bias * scale + shift
        return weight * scale[:, None, None, None], bias


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
        self._known: set[int] = set()
        self._lookout = Lookout()

    def __len__(self) -> int:
        return sum(not fold.refused for fold in self._folds.values())

    def refusals(self) -> list[str]:
        """Why some are not used, each reason once."""
        return sorted({fold.refused for fold in self._folds.values() if fold.refused})

    def get(self, key: Key, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Fold:
        """What ``make`` gives of ``tensors`` as they are; ``key`` has their ids."""
        found = self._folds.get(key)
        if found is not None:
            if found.contents.lasts(tensors):
                return found
            self._changes[key] = self._changes.get(key, 0) + 1
        often = self._changes.get(key, 0) >= _MAX_CHANGES
        refused = "its weights change again and again" if often else ""
        with torch.inference_mode(False), torch.no_grad():
            operation = None if refused else make()
        fold = self._folds[key] = Fold(operation, self._lookout.contents(tensors), refused)
        return fold

    def check(self, known: set[int]) -> None:
        """Look for unseen writes; drop what was made of tensors whose ids are not known."""
        self._lookout.look()
        if known != self._known:
            self._known, old = known, self._folds
            used = {key: map(id, fold.contents.tensors) for key, fold in old.items()}
            self._folds = {key: old[key] for key, ids in used.items() if known.issuperset(ids)}
