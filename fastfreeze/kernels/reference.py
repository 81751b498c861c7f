"""What every kernel must compute, in a few lines of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
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
    state_dtype: torch.dtype | None = None,
) -> None:
    """One SGD step in place, operation for operation ``torch.optim.SGD``'s for-loop.

    Args:
        params: tensors to update.
        grads: their gradients, of the same shapes and dtypes; None leaves a parameter as it is.
        momentum_buffers: one per parameter; None where a parameter has had no step yet, and
            replaced by a buffer if ``momentum`` is not 0. The first step copies the gradient into
            it, undampened.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        grad_scale: what the loss was multiplied by; the gradients are divided by it in place.
        state_dtype: buffers are at least of this dtype; None makes them as their gradients.
    """
    for i, (param, gradient) in enumerate(zip(params, grads, strict=True)):
        if gradient is None:
            continue
        grad = gradient if grad_scale is None else gradient.mul_(1.0 / grad_scale)
        if state_dtype is not None:
            grad = grad.to(torch.promote_types(grad.dtype, state_dtype))
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


@torch.no_grad()
def adam_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: list[Tensor | None],
    exp_avg_sqs: list[Tensor | None],
    max_exp_avg_sqs: list[Tensor | None],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    amsgrad: bool,
    grad_scale: float | None = None,
    state_dtype: torch.dtype | None = None,
) -> None:
    """One Adam or AdamW step in place, operation for operation ``torch.optim.Adam``'s for-loop.

    It computes in the widest dtype of a parameter, its gradient and its moments, float32 at least,
    and rounds once to those that are narrower.

    Args:
        params: tensors to update.
        grads: their gradients, strided; None leaves a parameter, and its ``steps``, as they are.
        exp_avgs, exp_avg_sqs: their moments; where one is None, zeros take its place in the list.
        max_exp_avg_sqs: the same; not looked at without ``amsgrad``.
        steps: one of a single element per parameter, how many steps it has taken; advanced.
        lr, beta1, beta2, eps, weight_decay, maximize, amsgrad: as in ``torch.optim.Adam``.
        decoupled: the weights decay as in ``torch.optim.AdamW``.
        grad_scale: what the loss was multiplied by; the gradients are divided by it in place.
        state_dtype: new moments are at least of this dtype; None makes them as their parameters.
    """
    moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)[: 3 if amsgrad else 2]
    for i, (param, gradient, count) in enumerate(zip(params, grads, steps, strict=True)):
        if gradient is None:
            continue
        if grad_scale is not None:
            gradient.mul_(1.0 / grad_scale)
        kept = [_real(param)]
        for each in moments:
            moment = each[i]
            if moment is None:
                dtype = torch.promote_types(param.dtype, state_dtype or param.dtype)
                moment = each[i] = torch.zeros_like(param, dtype=dtype)
            kept.append(_real(moment))
        grad = _real(gradient.resolve_conj())
        wide = reduce(torch.promote_types, (t.dtype for t in (*kept, grad)), torch.float32)
        p, m, v, *largest = worked = [t.to(wide) for t in kept]
        grad = grad.to(wide)
        grad = -grad if maximize else grad
        k = count.add_(1).item()
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            grad = grad.add(p, alpha=weight_decay)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        for maximum in largest:
            v = torch.maximum(maximum, v, out=maximum)
        denominator = (v.sqrt() / (1 - beta2**k) ** 0.5).add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**k))
        for own, result in zip(kept, worked, strict=True):
            if result is not own:
                own.copy_(result)


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor's real and imaginary parts side by side; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which probabilities of logits of ``dtype`` are summed: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_reference(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature`` less each row's maximum, in the dtype of sums.

    The maximum goes first, so that a small temperature makes no infinity of a large logit.
    """
    z = logits.to(sum_dtype(logits.dtype))
    return (z - z.detach().amax(-1, keepdim=True)) / temperature


def softmax_add_reference(
    total: Tensor | None, logits: Tensor, weight: float, temperature: float
) -> Tensor:
    """``total + weight * softmax(logits / temperature)``; a total of None counts as 0."""
    p = weight * torch.softmax(scaled_reference(logits, temperature), dim=-1)
    return p if total is None else total + p


def ensemble_softmax_reference(
    members: Sequence[Tensor], weights: Sequence[float] | None, temperature: float, log: bool
) -> Tensor:
    """Weighted mean over members of the softmax, or its logarithm, in the members' dtype."""
    total: Tensor | None = None
    logs = []
    for w, z in zip(weights or equal_weights(len(members)), members, strict=True):
        if log:
            p_log = torch.log_softmax(scaled_reference(z, temperature), dim=-1)
            logs.append(p_log + log_weight(w))
        else:
            total = softmax_add_reference(total, z, w, temperature)
    mean = _log_sum_exp(torch.stack(logs)) if total is None else total
    return mean.to(members[0].dtype)


def _log_sum_exp(logs: Tensor) -> Tensor:
    """Over the first dimension; where all are -inf the gradient is 0, not NaN."""
    masked = (logs == -math.inf).all(0)
    sums = torch.logsumexp(logs.masked_fill(masked, 0.0), dim=0)
    return sums.masked_fill(masked, -math.inf)


def entropy_reference(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; a probability of 0 adds nothing."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1).clamp(min=0)


def mutual_information_reference(entropy: Tensor, member_entropy: Tensor) -> Tensor:
    """The mean's entropy less the mean of the members' own: their disagreement, never below 0."""
    return (entropy - member_entropy).clamp(min=0)


def nll_reference(probabilities: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Negative logarithm of each label's probability [..., C]; NaN for a label that is no class.

    A probability below the smallest normal number of ``dtype`` counts as that number.
    """
    return -of_label_reference(probabilities, labels).clamp(min=torch.finfo(dtype).tiny).log()


@torch.no_grad()
def ensemble_statistics_reference(
    members: Sequence[Tensor],
    weights: Sequence[float] | None,
    temperature: float,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean probabilities, their maximum and where it is, entropy, mutual information, NLL."""
    mean = member_entropy = members[0].new_zeros(())
    label_logs = []
    for w, z in zip(weights or equal_weights(len(members)), members, strict=True):
        scaled = scaled_reference(z, temperature)
        p = torch.softmax(scaled, dim=-1)
        mean = mean + w * p
        member_entropy = member_entropy + w * entropy_reference(p)
        if labels is not None:
            p_log = torch.log_softmax(scaled, dim=-1)
            label_logs.append(of_label_reference(p_log, labels) + log_weight(w))
    max_probability, argmax = mean.max(-1)
    entropy = entropy_reference(mean)
    mutual_information = mutual_information_reference(entropy, member_entropy)
    nll = -torch.logsumexp(torch.stack(label_logs), dim=0) if label_logs else mean.new_empty(0)
    probabilities = mean.to(members[0].dtype)
    return probabilities, max_probability, argmax, entropy, mutual_information, nll


def of_label_reference(values: Tensor, labels: Tensor) -> Tensor:
    """Each row's value [..., C] at its label [...]; NaN for a label that is no class."""
    known = (labels >= 0) & (labels < values.shape[-1])
    at = torch.where(known, labels, 0)
    return torch.where(known, values.gather(-1, at[..., None])[..., 0], math.nan)


def equal_weights(count: int) -> list[float]:
    """Weights of a plain mean."""
    return [1.0 / count] * count


def log_weight(weight: float) -> float:
    """Logarithm of a member's weight; -inf for a member that counts for nothing."""
    return math.log(weight) if weight > 0 else -math.inf


def affine_relu_cat_reference(
    parts: Sequence[Tensor], scale: Tensor, shift: Tensor, relu: bool
) -> Tensor:
    """``relu(x * scale + shift)`` per channel of the parts side by side, in the parts' dtype."""
    x = torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
    y = x.to(sum_dtype(x.dtype)) * scale[:, None, None] + shift[:, None, None]
    return (y.relu() if relu else y).to(x.dtype)


def winograd_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int],
    relu: bool = False,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
) -> Tensor:
    """The convolution, of the weight [K, C, 3, 3] itself; any dtype."""
    if input_scale is not None and input_shift is not None:
        input = affine_relu_cat_reference([input], input_scale, input_shift, relu=True)
    y = F.conv2d(input, weight, bias, padding=padding)
    y = y if residual is None else y + residual
    return y.relu() if relu else y
