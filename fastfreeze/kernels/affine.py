"""A scale and a shift per channel with the ReLU behind, as a frozen norm is, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfreeze.kernels import library
from fastfreeze.kernels.library import KERNEL_DTYPES
from fastfreeze.kernels.reference import affine_relu_cat_reference, sum_dtype


def affine_relu_cat(
    parts: Sequence[Tensor], scale: Tensor, shift: Tensor, *, relu: bool = True
) -> Tensor:
    """``relu(x * scale + shift)`` of ``x = torch.cat(parts, 1)``, which is not made.

    Computed in float32 (float64 for float64 parts) and rounded once; on a CPU with multiply-add
    instructions the product is not rounded. NaN stays NaN. With the CPU kernel, where no gradient
    is wanted, in one pass over the memory; else with PyTorch's operators.

    Args:
        parts: one or more images [N, C_i, H, W], float16, bfloat16, float32 or float64, of one
            dtype and device and of any strides.
        scale, shift: [C], C being the sum of all C_i, of the parts' dtype or float32.
        relu: False leaves the ReLU out.

    Returns:
        [N, C, H, W], of the parts' dtype, channels_last if every part's channels are adjacent in
        memory, else contiguous.

    Raises:
        TypeError: the parts are of another dtype.
        ValueError: ``parts`` is empty, or shapes, dtypes or devices do not go together.
    """
    _check(parts, scale, shift)
    wants_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*parts, scale, shift)
    )
    if wants_gradient or library.refuses_device("cpu", parts[0].device) is not None:
        return affine_relu_cat_reference(parts, scale, shift, relu)
    dtype = sum_dtype(parts[0].dtype)
    scale, shift = scale.to(dtype).contiguous(), shift.to(dtype).contiguous()
    operator = torch.ops.fastfreeze.affine_relu_cat.default
    adjacent = all(p.stride(1) == 1 or p.shape[1] == 1 for p in parts)  # each pixel's channels
    return operator(list(parts), scale, shift, adjacent, relu)  # type: ignore[no-any-return]


def _check(parts: Sequence[Tensor], scale: Tensor, shift: Tensor) -> None:
    if not parts:
        raise ValueError("parts must be one tensor or more, got none")
    first = parts[0]
    if first.dtype not in KERNEL_DTYPES:
        raise TypeError(f"x must be floating-point, of 16, 32 or 64 bits, got {first.dtype}")
    for part in parts:
        if part.ndim != 4:
            raise ValueError(f"x must be images [N, C, H, W], got shape {tuple(part.shape)}")
        alike = part.shape[0] == first.shape[0] and part.shape[2:] == first.shape[2:]
        if not alike or part.dtype != first.dtype or part.device != first.device:
            raise ValueError(
                "parts must differ in nothing but their channels, got "
                f"{tuple(part.shape)} {part.dtype} on {part.device} beside "
                f"{tuple(first.shape)} {first.dtype} on {first.device}"
            )
    channels = sum(part.shape[1] for part in parts)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.shape != (channels,):
            raise ValueError(f"{name} must have shape [{channels}], got {tuple(vector.shape)}")
        if vector.dtype not in (first.dtype, torch.float32) or vector.device != first.device:
            raise ValueError(
                f"{name} must be {first.dtype} or torch.float32 on {first.device}, "
                f"got {vector.dtype} on {vector.device}"
            )


def _fake(
    parts: Sequence[Tensor], scale: Tensor, shift: Tensor, channels_last: bool, relu: bool
) -> Tensor:
    N, _, H, W = parts[0].shape
    kind = torch.channels_last if channels_last else torch.contiguous_format
    channels = sum(part.shape[1] for part in parts)
    return torch.empty(
        (N, channels, H, W), dtype=parts[0].dtype, device=parts[0].device, memory_format=kind
    )


torch.library.register_fake("fastfreeze::affine_relu_cat", _fake)
