"""Averages of an ensemble's softmax probabilities: of all members at once, or one at a time.

Logits are never stacked: the kernels read each member's where they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfreeze.kernels import library
from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.reference import (
    ensemble_softmax_reference,
    ensemble_statistics_reference,
    entropy_reference,
    equal_weights,
    log_weight,
    mutual_information_reference,
    nll_reference,
    scaled_reference,
    softmax_add_reference,
    sum_dtype,
)
from fastfreeze.kernels.softmax_arguments import (
    check_logits,
    check_rows,
    check_weight,
    checked_labels,
    checked_temperature,
    choose_backend,
    classes_back,
    classes_last,
    described,
    member_list,
    new_statistics,
    normalised_weights,
)


def ensemble_softmax(
    members: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    log: bool = False,
    dim: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Mean over the members of an ensemble of their softmax probabilities.

    Probabilities are averaged, not logits, as in Snapshot Ensembles (Huang et al., ICLR 2017).
    They are computed and summed in float32 (float64 for float64 logits) and rounded once.
    Differentiable with respect to the members, any number of times, and traced by
    ``torch.compile``.

    Args:
        members: logits, not probabilities, of M >= 1 members, as one tensor [M, ..., C] or a
            sequence of M tensors [..., C] of one shape, dtype and device: at least one batch
            dimension, of any size, and C >= 2 classes. float16, bfloat16, float32 or float64. Rows
            of unit stride are read in place, whatever lies between them. ``-inf`` masks a class.
        weights: M finite numbers >= 0, of which the sum is > 0: the members' shares, which are
            divided by the sum. None: equal shares.
        temperature: 1e-30..1e30; logits are divided by it.
        log: return the logarithm of the mean, finite and accurate where the mean underflows.
        dim: the dimension of the classes in each member, 1 for [B, C, H, W]. None: the last, of
            members of up to three dimensions; of more it has to be given.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses the fastest that can take the
            members.

    Returns:
        Probabilities [..., C], or their logarithms, of the members' shape and dtype; contiguous if
        the classes are last. The CPU's are the same bits for every number of threads.

    Raises:
        TypeError: ``members`` is not made of dense floating-point tensors, or an option is not of
            its type.
        ValueError: shapes, dtypes or devices do not go together; one class alone, of which the
            softmax is 1 whatever the model says; an option is outside its range; a row with NaN or
            +inf, or with nothing but -inf (not looked for on a GPU, where that would wait for it,
            nor under ``torch.compile``: there such a row comes out NaN); or members that the
            backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    logits = member_list(members, dim)
    shares = normalised_weights(weights, len(logits))
    temperature = checked_temperature(temperature)
    chosen = choose_backend(backend, "members[0]", logits)
    if chosen == "reference":
        mean = ensemble_softmax_reference(logits, shares, temperature, log)
    else:
        mean = _operator(chosen, "ensemble_softmax")(logits, shares, temperature, log)
    check_rows(mean, logits, "members[{}]")
    return classes_back(mean, dim)


@dataclass(frozen=True, eq=False)
class EnsembleStatistics:
    """What an ensemble predicts, how surely, and how much its members differ.

    All but ``probabilities`` and ``argmax`` are float32 (float64 for float64 logits).

    Attributes:
        probabilities: mean of the members' probabilities [..., C], of their dtype.
        max_probability: [...], the highest of them.
        argmax: [...], int64: its class, the first if tied.
        entropy: [...], of the mean, in nats: all that is uncertain.
        mutual_information: [...], in nats: what of the entropy is disagreement of the members, the
            rest being the mean of their own entropies. Never negative.
        nll: [...], negative logarithm of the label's mean probability; None without labels.
    """

    probabilities: Tensor
    max_probability: Tensor
    argmax: Tensor
    entropy: Tensor
    mutual_information: Tensor
    nll: Tensor | None


@torch.no_grad()
def ensemble_statistics(
    members: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    dim: int | None = None,
    backend: Backend | None = None,
) -> EnsembleStatistics:
    """:func:`ensemble_softmax` with statistics of its predictions, in one pass over the members.

    Gradients do not flow through it.

    Args:
        members, weights, temperature, dim, backend: as in :func:`ensemble_softmax`.
        labels: integers [...], the classes 0..C-1 of the rows: [B, H, W] of [B, C, H, W].

    Raises:
        TypeError, ValueError: as :func:`ensemble_softmax`, and for labels of another shape or
            outside 0..C-1 (not looked for on a GPU, nor under ``torch.compile``: there the row's
            NLL is NaN).
        BackendUnavailableError: the backend asked for cannot run here.
    """
    logits = member_list(members, dim)
    shares = normalised_weights(weights, len(logits))
    temperature = checked_temperature(temperature)
    classes = checked_labels(labels, logits[0])
    chosen = choose_backend(backend, "members[0]", logits)
    if chosen == "reference":
        results = ensemble_statistics_reference(logits, shares, temperature, classes)
    else:
        operator = _operator(chosen, "ensemble_statistics")
        results = operator([z.detach() for z in logits], shares, temperature, classes)
    check_rows(results[0], logits, "members[{}]")
    probabilities, maximum, argmax, entropy, information, nll = results
    return EnsembleStatistics(
        probabilities=classes_back(probabilities, dim),
        max_probability=maximum,
        argmax=argmax,
        entropy=entropy,
        mutual_information=information,
        nll=None if labels is None else nll,
    )


class EnsembleAverage:
    """Mean of the softmax probabilities of members that come one at a time.

    Keeps two sums of the shape of the logits, in float32 (float64 for float64 logits), with
    ``statistics`` a sum of entropies, and nothing else of the members. Gradients do not flow
    through it.

    Args:
        temperature: as in :func:`ensemble_softmax`.
        statistics: whether :meth:`statistics` will be asked for.
        dim, backend: as in :func:`ensemble_softmax`.

    Example:
        >>> average = EnsembleAverage()
        >>> for model in models:
        ...     average.update(model(x))
        >>> probabilities = average.mean()
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        statistics: bool = False,
        dim: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        if backend is not None:
            library.require(backend)
        self._temperature = checked_temperature(temperature)
        self._backend = backend
        self._dim = dim
        self._has_statistics = statistics
        self._total: Tensor | None = None
        self._spare: Tensor | None = None  # the next sum's memory: a bad member leaves the total
        self._entropy: Tensor | None = None  # the weighted sum of the members' entropies
        self._weight = 0.0
        self._dtype = torch.float32
        self._count = 0

    @property
    def count(self) -> int:
        """How many members there were."""
        return self._count

    def update(self, logits: Tensor, weight: float = 1.0) -> None:
        """Take in a member.

        Args:
            logits: [..., C], as :func:`ensemble_softmax` takes them; of the first member's shape,
                dtype and device.
            weight: finite and >= 0; the member's share in the mean, in proportion to the others'.

        Raises:
            TypeError, ValueError: as :func:`ensemble_softmax`; the average is left as it was.
        """
        check_logits("logits", logits, self._dim)
        check_weight("weight", weight)
        logits = classes_last(logits, self._dim)
        if self._total is not None:
            expected = (self._total.shape, self._dtype, self._total.device)
            if expected != (logits.shape, logits.dtype, logits.device):
                raise ValueError(
                    f"logits must be like the first update's: expected {described(*expected)}, "
                    f"got {described(logits.shape, logits.dtype, logits.device)}"
                )
        with torch.no_grad():  # as a decorator torch 2.10 could not compile it
            total, entropy = self._plus(logits.detach(), float(weight))
        check_rows(total, [logits], "logits")
        self._total, self._spare, self._entropy = total, self._total, entropy
        self._dtype, self._weight = logits.dtype, self._weight + weight
        self._count += 1

    def _plus(self, logits: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
        """The sums with one more member, beside those kept."""
        dtype, temperature = sum_dtype(logits.dtype), self._temperature
        entropy = None
        if self._has_statistics:
            entropy = logits.new_zeros(logits.shape[:-1], dtype=dtype)
            if self._entropy is not None:
                entropy += self._entropy
        chosen = choose_backend(self._backend, "logits", [logits])
        if chosen != "reference":
            total = self._spare
            if total is None or not _writable(total):
                total = torch.empty(logits.shape, dtype=dtype, device=logits.device)
            add = _operator(chosen, "softmax_add")
            add(total, entropy, self._total, logits, weight, temperature)
            return total, entropy
        if entropy is not None:
            p = torch.softmax(scaled_reference(logits, temperature), dim=-1)
            entropy += weight * entropy_reference(p)
        return softmax_add_reference(self._total, logits, weight, temperature), entropy

    def mean(self) -> Tensor:
        """The mean of the members' probabilities: [..., C], of the logits' dtype.

        Raises:
            RuntimeError: there was no member yet, or none with a weight > 0.
        """
        return classes_back(self._mean().to(self._dtype), self._dim)

    def _mean(self) -> Tensor:
        if self._total is None or self._weight == 0:
            raise RuntimeError(
                "the mean of no members: update(logits) comes first, with a weight > 0"
            )
        return self._total / self._weight

    @torch.no_grad()
    def statistics(self, labels: Tensor | None = None) -> EnsembleStatistics:
        """The statistics of the members so far, as of :func:`ensemble_statistics`.

        The members being gone, a label's probability below the smallest normal number counts as
        that number: ``nll`` is at most 87.3 (708.4 for float64 logits).

        Raises:
            RuntimeError: as :meth:`mean`, or the average was made without ``statistics=True``.
            TypeError, ValueError: as :func:`ensemble_statistics`.
        """
        if not self._has_statistics:
            raise RuntimeError("statistics must be asked for: EnsembleAverage(statistics=True)")
        mean = self._mean()
        classes = checked_labels(labels, mean)
        assert self._entropy is not None
        max_probability, argmax = mean.max(-1)
        entropy = entropy_reference(mean)
        return EnsembleStatistics(
            probabilities=classes_back(mean.to(self._dtype), self._dim),
            max_probability=max_probability,
            argmax=argmax,
            entropy=entropy,
            mutual_information=mutual_information_reference(entropy, self._entropy / self._weight),
            nll=None if classes is None else nll_reference(mean, classes, mean.dtype),
        )


def _writable(tensor: Tensor) -> bool:
    """Whether it may be written to: outside of inference mode, what was made inside may not."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def _operator(backend: Backend, name: str) -> Any:
    prefix = "triton_" if backend == "triton" else ""
    return getattr(torch.ops.fastfreeze, prefix + name).default


# What torch must know of the operators: shapes, gradients, and the Triton kernels. An operator
# triton_* has the schema of the operator without the prefix, which C++ implements.


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
    "softmax_add": lambda *_, **__: None,  # it makes no tensor
}
for _name, _fake in _FAKES.items():
    torch.library.impl(f"fastfreeze::triton_{_name}", ("cpu", "cuda"))(_triton(_name))
    for _prefix in ("", "triton_"):
        torch.library.register_fake(f"fastfreeze::{_prefix}{_name}", _fake)
for _name in ("ensemble_softmax", "triton_ensemble_softmax"):
    torch.library.register_autograd(
        f"fastfreeze::{_name}", _mean_backward, setup_context=_save_inputs
    )
