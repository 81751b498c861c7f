"""What every kernel must compute, in a few lines of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | None = None,
) -> None:
    """One SGD step in place, operation for operation ``torch.optim.SGD``'s for-loop.

    See :func:`fastfreeze.ops.sgd.sgd` for the arguments.
    """
    for i, (param, gradient) in enumerate(zip(params, grads, strict=True)):
        if gradient is None:
            continue
        grad = gradient if grad_scale is None else gradient.mul_(1.0 / grad_scale)
        if maximize:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        if momentum != 0:
            buffer = momentum_buffers[i]
            if buffer is None:
                buffer = momentum_buffers[i] = grad.clone()
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(grad, alpha=-lr)
