"""Hashes of what tensors hold, and a file for each hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Thread

import safetensors.torch
import torch
from torch import Tensor

from fastfreeze.errors import SnapshotError
from fastfreeze.files import open_file, write_atomic
from fastfreeze.trimming.bits import bits, same_bits

HASH = re.compile("[0-9a-f]{64}")
_FILE = re.compile(rf"tensor-{HASH.pattern}\.safetensors")
_MAX_HEADER_BYTES = 4096
_WRITERS = 8  # at once: most of a small file's time is waiting for the disk

Spec = tuple[tuple[int, ...], str]  # a tensor's shape and its dtype's name


def spec_of(tensor: Tensor) -> Spec:
    return tuple(tensor.shape), dtype_name(tensor.dtype)


def described(spec: Spec) -> str:
    """A spec in words, which are also a part of what is hashed."""
    return f"{spec[1]} {list(spec[0])}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_path(directory: Path, digest: str) -> Path:
    """The file of the tensor of a hash."""
    return directory / f"tensor-{digest}.safetensors"


def tensor_files(directory: Path) -> list[Path]:
    """All files whose name is one that a tensor's file may have."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _FILE.fullmatch(path.name)]
    return [path for path in found if path.is_symlink() or not path.is_dir()]


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write each of some CPU tensors into the file of its hash."""
    left = iter(list(tensors.items()))
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for digest, tensor in left:  # each thread takes the next
                if errors:
                    return
                content = safetensors.torch.save({"tensor": tensor})
                write_atomic(tensor_path(directory, digest), content)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=write) for _ in range(min(_WRITERS, len(tensors)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def is_intact(directory: Path, digest: str, name: str, spec: Spec) -> bool:
    """Whether :func:`read_tensor` finds a tensor as it was written."""
    try:
        read_tensor(directory, digest, name, spec)
    except SnapshotError:
        return False
    return True


def read_tensor(directory: Path, digest: str, name: str, spec: Spec) -> Tensor:
    """The tensor of a hash, which errors call ``name``.

    Its file is read, not mapped into memory: one that is cut short meanwhile would kill the
    process.

    Raises:
        SnapshotError: it is not there as it was written.
    """
    path = tensor_path(directory, digest)
    try:
        with torch.device("cpu"), open_file(path) as file:
            most = torch.Size(spec[0]).numel() * getattr(torch, spec[1]).itemsize
            size = min(os.fstat(file.fileno()).st_size, most + _MAX_HEADER_BYTES)
            (tensor,) = safetensors.torch.load(file.read(size)).values()
        if spec_of(tensor) != spec:
            raise ValueError(f"it holds a {described(spec_of(tensor))}, not a {described(spec)}")
        if content_hash(tensor) != digest:
            raise ValueError("the tensor's sha256 is another")
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read, it holds {name!r}: {error}") from error
    except Exception as error:  # of many kinds
        raise SnapshotError(f"{path} is truncated or altered, at {name!r}: {error}") from error
    return tensor


def content_hash(tensor: Tensor) -> str:
    """sha256 of a CPU tensor's dtype, shape and bytes, in hexadecimal digits."""
    digest = hashlib.sha256(f"{described(spec_of(tensor))}\n".encode())
    digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def copy_of(tensor: Tensor, device: torch.device, *, wait: bool = True) -> Tensor:
    """A contiguous copy; with ``wait=False`` one of a CUDA tensor is made in its stream's order."""
    later = tensor.is_cuda and not wait
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=later)
    return copy.copy_(tensor.detach(), non_blocking=later)


@cache
def can_be_stored(dtype: torch.dtype) -> bool:
    """Whether safetensors, here, takes tensors of this dtype and gives them back."""
    try:
        tensor = copy_of(torch.empty(2, dtype=dtype, device="cpu"), torch.device("cpu"))
        found = safetensors.torch.load(safetensors.torch.save({"tensor": tensor}))["tensor"]
        return found.dtype == dtype and same_bits(found, tensor)
    except Exception:  # of many kinds
        return False
