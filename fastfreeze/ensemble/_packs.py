"""Tensors by what they hold: hashes of their content, and files of tensors, called packs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastfreeze.errors import SnapshotError
from fastfreeze.files import write_atomic


@dataclass(frozen=True)
class Pack:
    """A safetensors file whose tensors are named by their hashes.

    Attributes:
        hashes: of its tensors.
        nbytes: size of the file.
    """

    hashes: tuple[str, ...]
    nbytes: int

    @property
    def file(self) -> str:
        """Its name: packs of the same tensors are the same file."""
        return f"pack-{hashlib.sha256(' '.join(self.hashes).encode()).hexdigest()[:32]}.safetensors"


def write_pack(directory: Path, tensors: Mapping[str, Tensor]) -> Pack:
    """Write tensors, by hash, into a pack of their own."""
    data = safetensors.torch.save(dict(tensors))
    pack = Pack(tuple(tensors), len(data))
    write_atomic(directory / pack.file, data)
    return pack


def read_pack(path: Path, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a pack, by hash, that share no memory with the file.

    Args:
        path: the pack.
        wanted: the hash of each tensor, and what errors call it.

    Raises:
        SnapshotError: one of them is not there as it was written.
    """
    found = {}
    expected = next(iter(wanted))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for expected in wanted:
                found[expected] = file.get_tensor(expected).clone()
                if content_hash(found[expected]) != expected:
                    raise ValueError("the tensor's sha256 is another")
    except OSError as error:
        raise SnapshotError(
            f"{path} cannot be read, it holds {wanted[expected]!r}: {error}"
        ) from error
    except Exception as error:  # its own error, or any that odd bytes provoke
        raise SnapshotError(
            f"{path} is truncated or altered, at {wanted[expected]!r}: {error}"
        ) from error
    return found


def content_hash(tensor: Tensor) -> str:
    """sha256 of a CPU tensor's dtype, shape and bytes, in hexadecimal digits."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one device hold the same, of whatever strides."""
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes in the order of its elements: uint8 ``[nbytes]``."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def copy_of(
    tensor: Tensor, device: torch.device, *, pin_memory: bool = False, wait: bool = True
) -> Tensor:
    """A contiguous copy; with ``wait=False`` it is made in the order of the current stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pin_memory)
    return copy.copy_(tensor.detach(), non_blocking=not wait)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def can_be_stored(dtype: torch.dtype) -> bool:
    """Whether safetensors, here, takes tensors of this dtype and gives them back."""
    try:
        tensor = copy_of(torch.empty(2, dtype=dtype), torch.device("cpu"))
        found = safetensors.torch.load(safetensors.torch.save({"tensor": tensor}))["tensor"]
        return found.dtype == dtype and same_bits(found, tensor)
    except Exception:  # of many kinds
        return False
