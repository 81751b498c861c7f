"""Tensors as rows, one for each sample of a batch: taken apart, put together, and hashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_WORD = 4  # bytes
_LOW_BITS = (1 << 33) - 1


class CannotKeepError(Exception):
    """Values cannot be kept row by row; the message says why."""


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]`` with the strides of ``tensor``, where its rows lie one after the other."""
    if not _rows_are_dense(tensor):
        return tensor.index_select(0, rows)
    taken = _flat(tensor).index_select(0, rows)
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

    def wait(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


def row_strides(tensor: Tensor) -> list[int]:
    """The strides that tell where the elements of a row lie."""
    pairs = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    return [stride for stride, size in pairs if size > 1]


def hash_rows(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row, on the tensor's device.

    A sum of the row's 32-bit words, each times an odd 64-bit number of its own, modulo 2**64. Any
    change within one word is noticed, and changes of several but for a chance of about 2**-32.
    """
    n = len(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    rows = tensor.detach().reshape(n, tensor.shape[1:].numel()).contiguous()
    width = rows.shape[1] * rows.element_size()
    if width % _WORD or rows.data_ptr() % _WORD:
        padded = rows.new_zeros((n, -(-width // _WORD) * _WORD), dtype=torch.uint8)
        padded[:, :width] = rows.view(torch.uint8) if width else 0
        rows = padded
    words = rows.view(torch.int32).to(torch.int64)
    factors = _factors(words.shape[1], words.device)
    if words.device.type == "cpu":
        return words @ factors
    return (words * factors).sum(1)  # no other device multiplies matrices of integers


@lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, the same ever after: they are part of the format of files."""
    x = torch.arange(1, count + 1, device="cpu") * -0x61C8864680B583EB
    x = (x ^ (x >> 31 & _LOW_BITS)) * -0x40A7B892E31B1A47
    return ((x ^ (x >> 31 & _LOW_BITS)) | 1).to(device)


@dataclass(frozen=True)
class _Form:
    """One value: what of its shape and strides does not depend on the batch.

    Rows that are *dense* are kept in the order of memory, those with gaps in logical order.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # from row to row, and within a row
    dense: bool
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """How a tuple of nested values is made of rows: as flat tensors ``[B, numel]``, and back.

    Those that are no tensors are *constants*: sizes, and what was computed of sizes.
    """

    forms: tuple[_Form | None, ...]  # None for a constant
    nesting: TreeSpec

    @classmethod
    def of(
        cls,
        values: Sequence[Any],
        batch_size: int,
        given: Sequence[Tensor],
        dtype: torch.dtype | None,
    ) -> Layout:
        """The layout of what was computed for a batch.

        Args:
            values: what is to be kept.
            batch_size: rows that each must have.
            given: what they were computed from.
            dtype: to store in what is floating-point and wider; None for as it is.

        Raises:
            CannotKeepError: a value is neither a constant nor a tensor of one row for each sample.
        """
        leaves, nesting = tree_flatten(tuple(values))
        tensors = [leaf for leaf in leaves if not _is_constant(leaf)]
        for value in tensors:
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                raise CannotKeepError(f"a {type(value).__name__} crosses, not a plain tensor")
            if value.ndim == 0 or len(value) != batch_size or not value.numel():
                raise CannotKeepError(
                    f"a value of shape {tuple(value.shape)} crosses, without a row for each of "
                    f"{batch_size} samples"
                )
        if len(devices := {str(tensor.device) for tensor in (*given, *tensors)}) > 1:
            raise CannotKeepError(f"inputs and what crosses are on {' and '.join(sorted(devices))}")
        for i, value in enumerate(tensors):
            if any(_share_memory(value, other) for other in (*given, *tensors[:i])):
                raise CannotKeepError("values that cross share memory")
        if not tensors:
            raise CannotKeepError("nothing but sizes crosses")
        return cls(tuple(None if _is_constant(v) else _form(v, dtype) for v in leaves), nesting)

    @property
    def narrows(self) -> bool:
        """Whether the dtype to store in changes values."""
        return any(form.stored != form.dtype for form in self.forms if form)

    @property
    def columns(self) -> tuple[tuple[torch.dtype, int], ...]:
        """The stored dtype and the elements of a row of each value."""
        return tuple((form.stored, form.numel) for form in self.forms if form)

    def flat(self, values: Sequence[Any]) -> list[Tensor]:
        """The rows of values that are tensors, in the dtypes that are stored.

        Raises:
            CannotKeepError: the values have another layout, or a dtype cannot hold them.
        """
        leaves, nesting = tree_flatten(tuple(values))
        if nesting != self.nesting:
            raise CannotKeepError("other values cross than before")
        pairs = zip(leaves, self.forms, strict=True)
        return [_flattened(value, form) for value, form in pairs if form]

    def constants(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Those of the values that are no tensors."""
        pairs = zip(tree_flatten(tuple(values))[0], self.forms, strict=True)
        return tuple(value for value, form in pairs if not form)

    def values(self, flat: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Any, ...]:
        """The values of rows, with the strides that they were first seen with."""
        rows, rest = iter(flat), iter(constants)
        leaves = [_unflattened(next(rows), form) if form else next(rest) for form in self.forms]
        values: tuple[Any, ...] = tree_unflatten(leaves, self.nesting)
        return values


def _form(value: Tensor, dtype: torch.dtype | None) -> _Form:
    dense = _rows_are_dense(value)
    if not (dense or _rows_are_apart(value)):
        raise CannotKeepError("a value crosses whose rows do not lie one after the other")
    narrower = (
        dtype is not None and value.is_floating_point() and dtype.itemsize < value.element_size()
    )
    stored = dtype if dtype is not None and narrower else value.dtype
    return _Form(tuple(value.shape[1:]), value.stride(), dense, value.dtype, stored)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, torch.Size, type(None)))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements in common."""
    storage = a.untyped_storage()
    if storage.data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.dtype != b.dtype:
        return True
    mine = torch.zeros(storage.nbytes() // a.element_size(), dtype=torch.bool, device="cpu")
    mine.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(mine.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _unflattened(rows: Tensor, form: _Form) -> Tensor:
    shape, rows = (len(rows), *form.shape), rows.to(form.dtype)
    if form.dense:
        return rows.as_strided(shape, form.strides)
    return _laid_out(rows.view(shape), form)


def _flattened(value: Any, form: _Form) -> Tensor:
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape[1:]) != form.shape
        or value.dtype != form.dtype
    ):
        raise CannotKeepError("a value crosses in another shape or dtype than before")
    if not form.dense:
        flat = value.reshape(len(value), form.numel)
    else:
        flat = _flat(value if value.stride() == form.strides else _laid_out(value, form))
    if form.stored == form.dtype:
        return flat
    stored = flat.to(form.stored)
    if not torch.equal(stored.isfinite(), flat.isfinite()):
        raise CannotKeepError(f"values do not fit into {form.stored}")
    return stored


def _laid_out(value: Tensor, form: _Form) -> Tensor:
    """A copy with the strides of the form."""
    new = torch.empty_strided(value.shape, form.strides, dtype=value.dtype, device=value.device)
    return new.copy_(value)


def _flat(tensor: Tensor) -> Tensor:
    """Dense rows as ``[B, numel]``, in the order of memory."""
    numel = tensor.shape[1:].numel()
    return tensor.as_strided((len(tensor), numel), (numel, 1))


def _rows_are_dense(tensor: Tensor) -> bool:
    """Whether each row is a piece of memory without gaps, and the next one follows."""
    return _rows_are_apart(tensor) and tensor.stride(0) == tensor.shape[1:].numel()


def _rows_are_apart(tensor: Tensor) -> bool:
    """Whether each element has its own place, and each row lies behind the one before."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return bool(tensor.stride(0) >= reach)
