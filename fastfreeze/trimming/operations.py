"""What folded convolutions and norms compute, with weights that were folded before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfreeze.kernels.affine import affine_relu_cat
from fastfreeze.kernels.winograd import pays as winograd_pays
from fastfreeze.kernels.winograd import transform_weight, winograd_conv2d

_WINOGRAD_PADDINGS = ((0, 0), (0, 1), (1, 0), (1, 1))


class Affine:
    """A frozen norm in one pass over what it reads, with a ReLU behind it.

    Args:
        scale, shift: float64, per channel.
        dtype: of what it reads.
    """

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        self.scale, self.shift = scale.to(dtype), shift.to(dtype)

    def __call__(self, parts: Sequence[Tensor], relu: bool) -> Tensor:
        """Of ``torch.cat(parts, 1)``."""
        return affine_relu_cat(parts, self.scale, self.shift, relu=relu)


class Convolution:
    """torch's convolution in the faster layout, or Winograd's for the images where that pays.

    Args:
        module: a ``nn.Conv2d``, or what has its weight, strides and so on.
        weight, bias: float64, with the norm behind it in them.
    """

    def __init__(self, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        self._module, dtype = module, module.weight.dtype
        self._format = _layout_for(weight.device, dtype)
        self._weight = weight.to(dtype).contiguous(memory_format=self._format)
        self._bias = None if bias is None else bias.to(dtype)
        self._may_take_winograd = may_take_winograd(module)
        self._transformed: Tensor | None = None

    def __call__(
        self, x: Tensor, residual: Tensor | None, relu: bool, affine: Affine | None = None
    ) -> Tensor:
        """``relu(convolution(relu(affine(x))) + residual)``, as far as these are asked for."""
        _, c, h, w = x.shape
        if self._may_take_winograd and winograd_pays(c, h, w, self._module.out_channels):
            return self._winograd(x, residual, relu, affine)
        if affine is not None:
            x = affine((x,), True)
        # Not oneDNN's convolution with a ReLU of its own: that makes numbers of NaN.
        x = x.to(self._weight.dtype).contiguous(memory_format=self._format)
        m, weight, b = self._module, self._weight, self._bias
        y = F.conv2d(x, weight, b, m.stride, m.padding, m.dilation, m.groups)
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    def _winograd(
        self, x: Tensor, residual: Tensor | None, relu: bool, affine: Affine | None
    ) -> Tensor:
        if self._transformed is None:
            self._transformed = transform_weight(self._weight)
        return winograd_conv2d(
            *(x, self._transformed, self._bias),
            padding=self._module.padding,  # pairs alone come here
            relu=relu,
            residual=residual,
            input_scale=affine.scale if affine else None,
            input_shift=affine.shift if affine else None,
        )


def may_take_winograd(module: Any) -> bool:
    """Whether a module is a convolution as :func:`winograd_conv2d` makes them."""
    how = (*module.kernel_size, *module.stride, *module.dilation)
    plain = how == (3, 3, 1, 1, 1, 1) and module.groups == 1
    is_cpu_fp32 = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    return plain and module.padding in _WINOGRAD_PADDINGS and is_cpu_fp32


def _layout_for(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The layout in which convolutions run fastest."""
    last = device.type == "cpu" or dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if last else torch.contiguous_format
