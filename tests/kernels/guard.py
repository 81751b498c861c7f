"""Tensors beside unreadable memory, where a stray access ends the process; numbers of threads."""

from __future__ import annotations

import ctypes
import mmap

import torch

PROT_NONE = 0
SIDES = ["before", "after"]


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


def by_threads(function, counts=(1, 2, 3)):
    """What a function returns with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results
