"""Tensors beside unreadable memory: a stray access ends the process."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

PROT_NONE = 0
SIDES = ["before", "after"]
every_side = pytest.mark.parametrize("side", SIDES)


def guarded(tensor, side="after"):
    """A contiguous copy that begins where unreadable memory ends, or ends where it begins."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, page + room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + room):
        assert libc.mprotect(ctypes.c_void_p(guard), page, PROT_NONE) == 0
    offset = page if side == "before" else page + room - size
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)
