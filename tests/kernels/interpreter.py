"""Makes Triton's interpreter round as a GPU does.

Its own rounds to bfloat16 towards zero, and the product in a fused multiply-add too.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_truncated = InterpreterBuilder.create_fp_trunc
_rounded_twice = InterpreterBuilder.create_fma


def _rounded(self, src, dst_type):
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _truncated(self, src, dst_type)
    values = torch.tensor(src.data).to(torch.bfloat16)
    return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)


def _fused(self, x, y, z):
    if z.dtype.scalar != tl.float32:
        return _rounded_twice(self, x, y, z)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), tl.float32)


def install():
    """For all kernels of this process."""
    InterpreterBuilder.create_fp_trunc = _rounded
    InterpreterBuilder.create_fma = _fused
