"""What the softmax operators compute, in plain PyTorch: the truth their kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
