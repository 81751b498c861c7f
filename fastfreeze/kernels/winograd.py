"""3x3 convolutions with a quarter of the multiplications, for inference on the CPU.

Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
2016), with interpolation points 0, +-3/4, +-3/2 and infinity, which lose less to rounding than the
usual 0, +-1, +-2: no more than a plain sum in float32 does.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfreeze.kernels import library

# And infinity; as kA and kB in csrc/cpu/winograd_kernel.cpp.
_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
_PLANES = (len(_POINTS) + 1) ** 2
_CHUNK = 32  # output channels that are transformed at once
_PANEL = 16  # output channels that lie together, as kPanel there


@functools.cache
def _kernel_transform() -> Tensor:
    """The matrix [6, 3], float64, that takes a row of a kernel to its values at the points."""
    rows = []
    for p in _POINTS:
        scale = math.prod(p - q for q in _POINTS if q != p)
        rows.append([1.0 / scale, p / scale, p * p / scale])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


@torch.no_grad()
def transform_weight(weight: Tensor) -> Tensor:
    """A convolution's weight as :func:`winograd_conv2d` wants it; computed once, in float64.

    Args:
        weight: [K, C, 3, 3], K >= 1, C >= 1, float32, on the CPU.

    Returns:
        [K, L], contiguous, of which the K rows together hold 36 transformed kernels [C, K] (4 times
        the weight, and more where K is no multiple of 16). Nothing but the number of rows means
        anything to others.

    Raises:
        TypeError: ``weight`` is not float32.
        ValueError: it has another shape, or is not on the CPU.
    """
    if weight.dtype != torch.float32:
        raise TypeError(f"weight must be torch.float32, got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must have shape [K, C, 3, 3], got {tuple(weight.shape)}")
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    K, C = weight.shape[:2]
    g = _kernel_transform()
    panels = weight.new_zeros(_PLANES, K + -K % _PANEL, C)
    for start in range(0, K, _CHUNK):  # in float64 it would be 8 times the weight at once
        part = weight[start : start + _CHUNK].double()
        planes = torch.einsum("xi,kcij,yj->xykc", g, part, g)
        panels[:, start : start + len(part)] = planes.reshape(_PLANES, len(part), C)
    flat = panels.view(_PLANES, -1, _PANEL, C).transpose(2, 3).reshape(-1)
    return F.pad(flat, (0, -flat.numel() % K)).view(K, -1)


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
    """A 3x3 convolution of stride 1, with what is around it in a network done on the way.

    ``conv2d(input, weight) + bias + residual``, then ReLU; where ``input_scale`` is given, of
    ``relu(input * input_scale + input_shift)`` in place of ``input``. Each image's result is the
    same bits in any batch and with any number of threads. What is not finite makes NaN of up to
    4x4 outputs at once.

    Args:
        input: [N, C, H, W], float32, on the CPU; best channels_last, which others are copied to.
        transformed: what :func:`transform_weight` makes of a weight [K, C, 3, 3].
        bias: [K].
        padding: zeros above and below, left and right: each 0 or 1.
        relu: whether ReLU ends it; NaN stays NaN.
        residual: of the result's shape, any strides.
        input_scale, input_shift: [C], both or neither.

    Returns:
        [N, K, H', W'], float32, channels_last.

    Raises:
        BackendUnavailableError: the CPU kernels are not built.
        RuntimeError: shapes, dtypes or devices do not go together.
        ValueError: a gradient is wanted; none flows through this.
    """
    library.require("cpu")
    tensors = (input, transformed, bias, residual, input_scale, input_shift)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("no gradient flows through winograd_conv2d: expected torch.no_grad()")
    operator = torch.ops.fastfreeze.winograd_conv2d.default
    return operator(  # type: ignore[no-any-return]
        input, transformed, bias, residual, input_scale, input_shift, *padding, relu
    )


def pays(C: int, H: int, W: int, K: int) -> bool:
    """Whether :func:`winograd_conv2d` is faster here than PyTorch's channels_last convolution.

    A rule from measurements, of the image's shape and the machine's instructions alone.

    Args:
        C, H, W: channels, height and width of an input image, with padding 1.
        K: output channels.
    """
    if C < 16 or K < 12 or C * K < 288 or 0 in (H, W):
        return False
    computed = 16 * math.ceil(H / 4) * math.ceil(W / 4) / (H * W)  # for each output that is wanted
    return (computed <= 2 or (computed <= 4 and C * K >= 2**18)) and _has_fast_instructions()


# Not for torch.compile to trace: a machine stays what it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_fast_instructions() -> bool:
    if not library.backends()["cpu"].available:
        return False
    level: int = torch.ops.fastfreeze.cpu_isa.default(-1)
    return level >= 1


def _fake(
    input: Tensor,
    transformed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    pad_h: int,
    pad_w: int,
    relu: bool,
) -> Tensor:
    N, _, H, W = input.shape
    shape = (N, transformed.shape[0], H + 2 * pad_h - 2, W + 2 * pad_w - 2)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last
    )


torch.library.register_fake("fastfreeze::winograd_conv2d", _fake)
