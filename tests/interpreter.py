"""Makes Triton's interpreter round to bfloat16 as a GPU does, where its own rounds towards zero."""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_truncated = InterpreterBuilder.create_fp_trunc


def _rounded(self, src, dst_type):
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _truncated(self, src, dst_type)
    values = torch.tensor(src.data).to(torch.bfloat16)
    return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)


def install():
    """For all kernels of this process."""
    InterpreterBuilder.create_fp_trunc = _rounded
