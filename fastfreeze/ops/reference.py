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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which probabilities of logits of ``dtype`` are summed: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ensemble_softmax_reference(members: Sequence[Tensor]) -> Tensor:
    """Mean over members of the softmax over the last dimension, in the members' dtype."""
    total = softmax_add_reference(None, members[0])
    for logits in members[1:]:
        total = softmax_add_reference(total, logits)
    return (total / len(members)).to(members[0].dtype)


def softmax_add_reference(total: Tensor | None, logits: Tensor) -> Tensor:
    """``total + softmax(logits)``, in float32, or float64 for float64 logits; None counts as 0."""
    probabilities = torch.softmax(logits, dim=-1, dtype=sum_dtype(logits.dtype))
    return probabilities if total is None else total + probabilities
