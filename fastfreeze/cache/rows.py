"""Tensors as rows, one for each sample of a batch: taken apart, put together, and hashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = 4  # bytes
_LOW_BITS = (1 << 33) - 1


class CannotKeepError(Exception):
    """Values cannot be kept row by row; the message says why."""


def by_sample(tensor: Tensor, n: int) -> Tensor:
    """``[n, ...]`` of a tensor that has as many rows for each of ``n`` samples."""
    return tensor if len(tensor) == n else tensor.unflatten(0, (n, -1))


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]`` with the strides of ``tensor``, where its rows lie one after the other."""
    if not _are_dense(tensor):
        return tensor.index_select(0, rows)
    taken = _in_memory(tensor).index_select(0, rows)
    return taken.as_strided((len(rows), *tensor.shape[1:]), tensor.stride())


def row_numbers(rows: Sequence[int], device: torch.device) -> Tensor:
    """int64 on ``device``; the host does not wait for it."""
    on_gpu = device.type == "cuda"
    numbers = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
    return numbers.to(device, non_blocking=on_gpu)


class Fetched:
    """A tensor on its way to the host: what is queued before it on a GPU need not be waited for."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)  # in pinned memory, if from a GPU
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def wait(self) -> list[int]:
        """Its numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[int] = self._tensor.tolist()
        return numbers


def row_strides(tensor: Tensor) -> list[int]:
    """The strides that tell where the elements of a row lie."""
    pairs = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    return [stride for stride, size in pairs if size > 1]


def hash_rows(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row, as it lies in memory, on the tensor's device.

    A sum of the row's 32-bit words, each times an odd 64-bit number of its own, modulo 2**64. Any
    change within one word is noticed, and changes of several but for a chance of about 2**-32.
    """
    n, numel = len(tensor), tensor.shape[1:].numel()
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
        numel *= 2
    tensor = tensor.resolve_neg()
    rows = _in_memory(tensor) if _are_dense(tensor) else tensor.reshape(n, numel).contiguous()
    width = numel * rows.element_size()
    if width % _WORD or rows.data_ptr() % _WORD:
        padded = rows.new_zeros((n, -(-width // _WORD) * _WORD), dtype=torch.uint8)
        padded[:, :width] = rows.view(torch.uint8) if width else 0
        rows = padded
    words = rows.view(torch.int32)
    factors = _factors(words.shape[1], words.device)
    if words.device.type == "cpu":  # NumPy needs no copy in 64 bits
        return torch.from_numpy(np.einsum("ij,j->i", words.numpy(), factors.numpy()))
    return (words * factors).sum(1)


@lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, the same ever after: they are part of the format of files."""
    x = torch.arange(1, count + 1, device="cpu") * -0x61C8864680B583EB
    x = (x ^ (x >> 31 & _LOW_BITS)) * -0x40A7B892E31B1A47
    return ((x ^ (x >> 31 & _LOW_BITS)) | 1).to(device)


@dataclass(frozen=True)
class Form:
    """What of a value's shape and strides does not depend on the batch: how its rows are kept.

    Attributes:
        times: rows of the value for each sample; the other attributes are those of all of them.
        shape: of a row.
        strides: from row to row, and within a row.
        dense: whether rows have no gaps: they are kept in the order of memory, others as they read.
        dtype: of the value.
        stored: of what is kept.
    """

    times: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dense: bool
    dtype: torch.dtype
    stored: torch.dtype

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
        if not _are_apart(value):
            raise CannotKeepError("a value is read whose rows do not lie one after the other")
        narrows = value.is_floating_point() and dtype and dtype.itemsize < value.element_size()
        stored = dtype if dtype is not None and narrows else value.dtype
        shape, strides = tuple(value.shape[1:]), value.stride()
        return cls(times, shape, strides, _are_dense(value), value.dtype, stored)

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
            flat = _in_memory(value if value.stride() == self.strides else self._laid_out(value))
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


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements in common."""
    storage = a.untyped_storage()
    if storage.data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.dtype != b.dtype:
        return True
    mine = torch.zeros(storage.nbytes() // a.element_size(), dtype=torch.bool, device="cpu")
    mine.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(mine.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _in_memory(tensor: Tensor) -> Tensor:
    """Dense rows as ``[n, numel]``, in the order of memory."""
    numel = tensor.shape[1:].numel()
    return tensor.as_strided((len(tensor), numel), (numel, 1))


def _are_dense(tensor: Tensor) -> bool:
    """Whether each row is a piece of memory without gaps, and the next one follows."""
    return _are_apart(tensor) and tensor.stride(0) == tensor.shape[1:].numel()


def _are_apart(tensor: Tensor) -> bool:
    """Whether each element has its own place, and each row lies behind the one before."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return bool(tensor.stride(0) >= reach)
