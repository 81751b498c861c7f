"""Images in the format of MNIST's files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file, packed or not: uint8, of the shape that its header tells.

    Two bytes of zero, one that tells the type (8: uint8), one the number of dimensions; then each
    dimension as four bytes, the highest first, and the values.

    Args:
        path: a name that ends with ``.gz`` is unpacked.

    Raises:
        OSError: there is no such file, or it is no whole idx file of bytes.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        kind, num_dims = raw[:3], raw[3]
        shape = np.frombuffer(raw, ">u4", num_dims, offset=4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (EOFError, IndexError, ValueError, zlib.error) as error:
        raise OSError(f"{path} is cut short or damaged: {error}") from error
    if kind != b"\0\0\x08":
        raise OSError(f"{path} is no idx file of bytes: it begins with {raw[:4]!r}")
    return torch.from_numpy(values.copy())
