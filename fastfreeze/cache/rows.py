"""Tensors as rows, one for each sample of a batch: taken apart and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfreeze.trimming.bits import are_apart, are_dense, in_memory


class CannotKeepError(Exception):
    """Values cannot be kept row by row; the message says why."""


def by_sample(tensor: Tensor, n: int) -> Tensor:
    """``[n, ...]`` of a tensor that has as many rows for each of ``n`` samples."""
    return tensor if len(tensor) == n else tensor.unflatten(0, (n, -1))


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """``tensor[rows]`` with the strides of ``tensor``, where its rows lie one after the other."""
    chosen = torch.tensor(rows, dtype=torch.int64, device=tensor.device)
    if not are_dense(tensor):
        return tensor.index_select(0, chosen)
    taken = in_memory(tensor).index_select(0, chosen)
    return taken.as_strided((len(rows), *tensor.shape[1:]), tensor.stride())


def row_strides(tensor: Tensor) -> list[int]:
    """The strides that tell where the elements of a row lie."""
    pairs = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    return [stride for stride, size in pairs if size > 1]


@dataclass(frozen=True)
class Form:
    """What of a value's shape and strides does not depend on the batch: how its rows are kept."""

    times: int  # rows of the value for each sample: all of these are what is called a row here
    shape: tuple[int, ...]  # of a row
    strides: tuple[int, ...]  # from row to row, and within a row
    dense: bool  # whether rows have no gaps: they are kept in the order of memory
    dtype: torch.dtype  # of the value
    stored: torch.dtype  # of what is kept

    @classmethod
    def of(cls, value: Tensor, n: int, dtype: torch.dtype | None) -> Form:
        """The form of a value with as many rows for each of ``n`` samples.

        Args:
            dtype: to store in what is floating-point and wider; None for as it is.

        Raises:
            CannotKeepError: it cannot be taken apart.
        """
        if value.layout is not torch.strided or not value.numel():
            raise CannotKeepError(f"a value of shape {tuple(value.shape)} cannot be kept in rows")
        times, value = len(value) // n, by_sample(value, n)
        if not are_apart(value):
            raise CannotKeepError("a value is read whose rows do not lie one after the other")
        narrows = value.is_floating_point() and dtype and dtype.itemsize < value.element_size()
        stored = dtype if dtype is not None and narrows else value.dtype
        shape, strides = tuple(value.shape[1:]), value.stride()
        return cls(times, shape, strides, are_dense(value), value.dtype, stored)

    @property
    def is_exact(self) -> bool:
        """Whether values come back as they were, not rounded."""
        return self.stored == self.dtype

    @property
    def column(self) -> tuple[torch.dtype, int]:
        """The stored dtype and the elements of a row."""
        return self.stored, torch.Size(self.shape).numel()

    def flat(self, value: Tensor, n: int) -> Tensor:
        """The rows of a value, ``[n, numel]``, in the dtype that is stored.

        Raises:
            CannotKeepError: the value has another form, or the dtype cannot hold it.
        """
        value = by_sample(value, n)
        if tuple(value.shape[1:]) != self.shape or value.dtype != self.dtype:
            raise CannotKeepError("a value is read in another shape or dtype than before")
        if not self.dense:
            flat = value.reshape(n, -1)
        else:
            flat = in_memory(value if value.stride() == self.strides else self._laid_out(value))
        if self.stored == self.dtype:
            return flat
        stored = flat.to(self.stored)
        if not torch.equal(stored.isfinite(), flat.isfinite()):
            raise CannotKeepError(f"values do not fit into {self.stored}")
        return stored

    def value(self, flat: Tensor) -> Tensor:
        """The value of such rows, with the strides that it was first seen with."""
        shape, flat = (len(flat), *self.shape), flat.to(self.dtype)
        if self.dense:
            value = flat.as_strided(shape, self.strides)
        else:
            value = self._laid_out(flat.view(shape))
        return value if self.times == 1 else value.flatten(0, 1)

    def _laid_out(self, value: Tensor) -> Tensor:
        """A copy with the strides of the form."""
        strides = self.strides
        new = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
        return new.copy_(value)
