"""The bits of tensors: compared, hashed, and how they lie in memory."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = 4  # bytes
_LOW_BITS = (1 << 33) - 1


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one device hold the same, of whatever strides."""
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes in the order of its elements: uint8 ``[nbytes]``."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def hash_rows(*tensors: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row of some tensors, on their device.

    Tensors of one row have it in common with each of the others'. It is a sum of the row's 32-bit
    words as they lie in memory, each times an odd 64-bit number of its own, modulo 2**64; those of
    several tensors are added, each times 3 to the number of those behind it. Any change within one
    word is noticed, and changes of several but for a chance of about 2**-32.
    """
    return combined([_hash_rows(tensor) for tensor in tensors])


def combined(hashes: Sequence[Tensor]) -> Tensor:
    """One hash for those that several tensors have of the same rows."""
    total, *more = hashes
    for following in more:
        total = total * 3 + following
    return total


def _hash_rows(tensor: Tensor) -> Tensor:
    n, numel = len(tensor), tensor.shape[1:].numel()
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
        numel *= 2
    tensor = tensor.resolve_neg()
    rows = in_memory(tensor) if are_dense(tensor) else tensor.reshape(n, numel).contiguous()
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


def checksum(tensor: Tensor) -> int | None:
    """Of a tensor's bits; None where it has none at hand, or a device would be waited for."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    with torch._C._DisableFuncTorch():  # whose tensors have no memory
        return zlib.crc32(bits(tensor).numpy().data)


@lru_cache(maxsize=256)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, the same ever after: they are part of the format of files."""
    x = torch.arange(1, count + 1, device="cpu") * -0x61C8864680B583EB
    x = (x ^ (x >> 31 & _LOW_BITS)) * -0x40A7B892E31B1A47
    return ((x ^ (x >> 31 & _LOW_BITS)) | 1).to(device)


def in_memory(tensor: Tensor) -> Tensor:
    """Dense rows as ``[n, numel]``, in the order of memory."""
    numel = tensor.shape[1:].numel()
    return tensor.as_strided((len(tensor), numel), (numel, 1))


def are_dense(tensor: Tensor) -> bool:
    """Whether each row is a piece of memory without gaps, and the next one follows."""
    return are_apart(tensor) and tensor.stride(0) == tensor.shape[1:].numel()


def are_apart(tensor: Tensor) -> bool:
    """Whether each element has its own place, and each row lies behind the one before."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return bool(tensor.stride(0) >= reach)
