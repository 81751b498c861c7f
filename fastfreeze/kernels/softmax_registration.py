"""What torch must know of the softmax operators: shapes, gradients, and the Triton kernels.

An operator ``triton_*`` has the schema of the operator without the prefix, which C++ implements.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfreeze.kernels.reference import equal_weights, log_weight, scaled_reference, sum_dtype
from fastfreeze.kernels.softmax_arguments import new_statistics


def _fake_mean(
    members: Sequence[Tensor], weights: Sequence[float] | None, temperature: float, log: bool
) -> Tensor:
    return members[0].new_empty(members[0].shape)


def _fake_statistics(
    members: Sequence[Tensor],
    weights: Sequence[float] | None,
    temperature: float,
    labels: Tensor | None,
) -> tuple[Tensor, ...]:
    return new_statistics(members[0], labels is not None)


def _fake_add(
    result: Tensor,
    entropy: Tensor | None,
    total: Tensor | None,
    logits: Tensor,
    weight: float,
    temperature: float,
) -> None:
    pass


_MeanInputs = tuple[list[Tensor], list[float] | None, float, bool]


def _save_inputs(ctx: Any, inputs: _MeanInputs, output: Tensor) -> None:
    members, weights, ctx.temperature, ctx.log = inputs
    ctx.weights = equal_weights(len(members)) if weights is None else weights
    ctx.save_for_backward(*members)


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], None, None, None]:
    """``p * (g - sum(g * p)) / temperature`` for each member, its softmax p computed anew.

    g is the gradient of p: the mean's times the member's weight. That of the mean's logarithm goes
    to the members by their shares in the mean, and is of log(p).
    """
    members, needed = ctx.saved_tensors, ctx.needs_input_grad[0]
    g = grad.to(sum_dtype(grad.dtype))
    shares = _shares(members, ctx.weights, ctx.temperature) if ctx.log else ctx.weights
    gradients: list[Tensor | None] = []
    for m, logits in enumerate(members):
        if not needed[m]:
            gradients.append(None)
            continue
        p = torch.softmax(scaled_reference(logits, ctx.temperature), dim=-1)
        of_log = shares[m] * g if ctx.log else shares[m] * g * p
        gradient = (of_log - p * of_log.sum(-1, keepdim=True)) / ctx.temperature
        gradients.append(gradient.to(logits.dtype))
    return gradients, None, None, None


def _shares(members: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Each member's share in each mean probability, [M, ..., C]."""
    logs = torch.stack(
        [
            torch.log_softmax(scaled_reference(z, temperature), dim=-1) + log_weight(w)
            for w, z in zip(weights, members, strict=True)
        ]
    )
    masked = (logs == -torch.inf).all(0)  # a class that no member has: no gradient, and no NaN
    return torch.softmax(logs.masked_fill(masked, 0.0), dim=0).masked_fill(masked, 0.0)


def _triton(name: str) -> Callable[..., Any]:
    """The Triton function of a name, imported when first called."""

    def call(*arguments: Any) -> Any:
        kernels = importlib.import_module("fastfreeze.kernels.softmax_triton")
        return getattr(kernels, name)(*arguments)

    return call


_FAKES: dict[str, Callable[..., Any]] = {
    "ensemble_softmax": _fake_mean,
    "ensemble_statistics": _fake_statistics,
    "softmax_add": _fake_add,
}
for _name, _fake in _FAKES.items():
    torch.library.impl(f"fastfreeze::triton_{_name}", ("cpu", "cuda"))(_triton(_name))
    for _prefix in ("", "triton_"):
        torch.library.register_fake(f"fastfreeze::{_prefix}{_name}", _fake)
for _name in ("ensemble_softmax", "triton_ensemble_softmax"):
    torch.library.register_autograd(
        f"fastfreeze::{_name}", _mean_backward, setup_context=_save_inputs
    )
