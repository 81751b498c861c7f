"""3x3 convolutions with fewer multiplications, for inference on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def transform_weight(weight: Tensor) -> Tensor:
    return weight


def winograd_conv2d(
    input: Tensor,
    transformed: Tensor,
    bias: Tensor | None = None,
    *,
    padding: tuple[int, int],
    relu: bool = False,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
) -> Tensor:
    if input_scale is not None and input_shift is not None:
        input = torch.relu(input * input_scale[:, None, None] + input_shift[:, None, None])
    y = F.conv2d(input, transformed, bias, padding=padding)
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).contiguous(memory_format=torch.channels_last)


def pays(C: int, H: int, W: int, K: int) -> bool:
    return False
