"""Tensors by what they hold: hashes of their content, and files of tensors, called packs."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastfreeze.errors import SnapshotError
from fastfreeze.files import open_file, write_atomic

_MAX_HEADER_BYTES = 100_000_000  # as the library safetensors has it

Spec = tuple[tuple[int, ...], str]  # a tensor's shape and its dtype's name


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


class PackReader:
    """Reads tensors of a store's packs by their hashes; each file is opened once.

    Files are read, not mapped into memory: one that is cut short meanwhile would kill the process.

    Args:
        directory: of the packs.
        pack_of: the pack that holds each hash.
    """

    def __init__(self, directory: Path, pack_of: Mapping[str, Pack]) -> None:
        self._directory, self._pack_of = directory, pack_of
        self._open: dict[Path, tuple[BufferedReader, int, Any]] = {}

    def __enter__(self) -> PackReader:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open.values():
            opened[0].close()

    def holds(self, wanted: str, name: str, spec: Spec) -> bool:
        """Whether a tensor is there as it was written; see :meth:`read`."""
        try:
            self.read(wanted, name, spec)
        except (KeyError, SnapshotError):
            return False
        return True

    def read(self, wanted: str, name: str, spec: Spec) -> Tensor:
        """A tensor.

        Args:
            wanted: its hash.
            name: what errors call it.
            spec: its shape and its dtype's name.

        Raises:
            KeyError: no pack is known to hold it.
            SnapshotError: it is not there as it was written.
        """
        path = self._directory / self._pack_of[wanted].file
        try:
            if path not in self._open:
                self._open[path] = _opened(path)
            tensor = _tensor_at(*self._open[path], wanted, spec)
            if content_hash(tensor) != wanted:
                raise ValueError("the tensor's sha256 is another")
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read, it holds {name!r}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"{path} is truncated or altered, at {name!r}: {error}") from error
        return tensor


def _opened(path: Path) -> tuple[BufferedReader, int, Any]:
    """A safetensors file, where its tensors begin, and its header."""
    file = open_file(path)
    try:
        size = int.from_bytes(file.read(8), "little")
        if size > min(os.fstat(file.fileno()).st_size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size} bytes does not fit")
        return file, 8 + size, json.loads(file.read(size))
    except BaseException:
        file.close()
        raise


def _tensor_at(file: BufferedReader, begin: int, header: Any, wanted: str, spec: Spec) -> Tensor:
    shape, dtype = torch.Size(spec[0]), getattr(torch, spec[1])
    try:
        start, end = (operator.index(i) for i in header[wanted]["data_offsets"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"its header does not tell where {wanted} is") from error
    size = os.fstat(file.fileno()).st_size - begin
    if not 0 <= start <= end <= size or end - start != shape.numel() * dtype.itemsize:
        raise ValueError(f"of {size} bytes, {start} to {end} are not a {spec[1]} {list(shape)}")
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    file.seek(begin + start)
    if file.readinto(bits(tensor).numpy().data) != end - start:
        raise ValueError("it ends too early")
    return tensor


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
        tensor = copy_of(torch.empty(2, dtype=dtype, device="cpu"), torch.device("cpu"))
        found = safetensors.torch.load(safetensors.torch.save({"tensor": tensor}))["tensor"]
        return found.dtype == dtype and same_bits(found, tensor)
    except Exception:  # of many kinds
        return False
