"""How good predicted probabilities are, and how much members differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.ensemble._checks import call_and_labels
from fastfreeze.kernels.reference import (
    entropy_reference,
    mutual_information_reference,
    nll_reference,
)
from fastfreeze.kernels.softmax_arguments import checked_labels as integer_labels
from fastfreeze.kernels.softmax_arguments import kind_of
from fastfreeze.text import format_table


@dataclass(frozen=True)
class PredictionScores:
    """How good predictions are: means over their rows, in float64.

    Attributes:
        error: share of rows, in 0..1, whose most probable class (the first, if tied) is not the
            label.
        nll: negative natural logarithm of the label's probability. A probability below the smallest
            normal number of its dtype counts as that number, so that a row costs at most 87.3 in
            float32 and bfloat16, 9.7 in float16, 708.4 in float64.
        brier: squared distance to the one-hot label, in 0..2: the sum over all classes (Brier,
            Monthly Weather Review, 1950). For two classes others often give half of it.
        ece: expected calibration error (Guo et al., ICML 2017, eq. 3), in 0..1. Rows are sorted
            into equal bins (i / num_bins, (i + 1) / num_bins] by their highest probability; it is
            the mean over rows of \\|accuracy - mean confidence\\| of the row's bin.
        entropy: in nats.
    """

    error: float
    nll: float
    brier: float
    ece: float
    entropy: float


@torch.no_grad()
def prediction_scores(
    probabilities: Tensor, labels: Tensor, *, num_bins: int = 15
) -> PredictionScores:
    """How good predicted probabilities are.

    Args:
        probabilities: [B, C], B >= 1, C >= 2, floating point, rows summing to 1. Of one column p,
            as a sigmoid gives, ``torch.cat([1 - p, p], 1)`` makes two.
        labels: [B], integers in 0..C-1.
        num_bins: of the calibration error, >= 1.

    Raises:
        TypeError, ValueError: they are not such; the message names the row.
    """
    check_int("num_bins", num_bins, minimum=1)
    p, y = checked_predictions(probabilities, labels)
    return _mean_scores(_row_scores(p, y, probabilities.dtype).cpu(), num_bins)


class GivesMemberProbabilities(Protocol):
    """What can be evaluated: a SnapshotEnsemble, or anything with this method."""

    @property
    def member_probabilities(self) -> Callable[..., Iterable[Tensor]]: ...


@dataclass(frozen=True)
class EnsembleEvaluation:
    """What :func:`evaluate` finds; ``print`` gives a table, ``dataclasses.asdict`` plain data.

    Attributes:
        members: the scores of each member.
        ensemble: those of the mean of their probabilities.
        mutual_information: mean over rows, in nats: the ensemble's entropy less the mean of its
            members' entropies, which comes from their disagreement. Never negative.
        disagreement: for each member and each other, the share of rows, in 0..1, on which their
            most probable classes differ.
        num_rows: how many rows there were.
        num_bins: bins of the calibration error.
    """

    members: tuple[PredictionScores, ...]
    ensemble: PredictionScores
    mutual_information: float
    disagreement: tuple[tuple[float, ...], ...]
    num_rows: int
    num_bins: int

    def __str__(self) -> str:
        M = len(self.members)
        named = {f"member {m}": scores for m, scores in enumerate(self.members)}
        named["ensemble"] = self.ensemble
        headers = ["", "error %", "NLL", "Brier", "ECE", "entropy"]
        rows = [
            [name, f"{100 * s.error:.2f}", *(f"{x:.4f}" for x in list(asdict(s).values())[1:])]
            for name, s in named.items()
        ]
        differing = sum(map(sum, self.disagreement)) / max(1, M * (M - 1))
        return (
            f"{format_table(headers, rows)}\n\n"
            f"{self.num_rows} rows; two members differ on {100 * differing:.2f}% of them; "
            f"mutual information {self.mutual_information:.4f} nats"
        )


@torch.no_grad()
def evaluate(
    ensemble: GivesMemberProbabilities, batches: Iterable[Any], *, num_bins: int = 15
) -> EnsembleEvaluation:
    """Score each member of an ensemble, and the mean of their probabilities, on labelled data.

    It calls the ensemble once for each batch, and keeps six numbers of each row and member. It
    computes in float64; the mean's NLL has the floor of the members' dtype.

    Args:
        ensemble: anything whose ``member_probabilities(*inputs)`` gives the probabilities [B, C] of
            the same members in turn, as :func:`prediction_scores` takes them.
        batches: pairs (inputs, labels), or dicts of which one item is "labels", on the ensemble's
            device; labels are integers [B] in 0..C-1. A tuple or list of inputs is passed as
            several arguments, a dict by name.
        num_bins: of the calibration error, >= 1.

    Raises:
        TypeError, ValueError: no batch, a batch or a prediction that is not such, or ``num_bins``
            is not a count; the message names the member and the row.
    """
    check_int("num_bins", num_bins, minimum=1)
    scored: list[Tensor] = []
    for i, batch in enumerate(batches):
        (inputs, keywords), labels = call_and_labels(f"batches[{i}]", batch)
        if labels is None:
            raise TypeError(
                f'batches must give pairs (inputs, labels), or dicts with "labels", '
                f"got {_described(batch)}"
            )
        members = list(ensemble.member_probabilities(*inputs, **keywords))
        count = len(scored[0]) - 1 if scored else max(1, len(members))
        if len(members) != count:
            raise ValueError(
                f"ensemble must give the same members for every batch, at least one: expected "
                f"{count}, got {len(members)}"
            )
        scored.append(_scored(members, labels))
    if not scored:
        raise ValueError("batches must give at least one batch, got none")
    rows = torch.cat(scored, -1)
    *each, mean = (_mean_scores(of_one, num_bins) for of_one in rows)
    entropies, classes = rows[:, 2], rows[:-1, 4]
    information = mutual_information_reference(entropies[-1], entropies[:-1].mean(0))
    differing = [(classes != own).double().mean(-1).tolist() for own in classes]
    return EnsembleEvaluation(
        members=tuple(each),
        ensemble=mean,
        mutual_information=information.mean().item(),
        disagreement=tuple(map(tuple, differing)),
        num_rows=rows.shape[-1],
        num_bins=num_bins,
    )


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} of {', '.join(map(repr, batch))}"
    return f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {kind}"


def _scored(members: list[Tensor], labels: Tensor) -> Tensor:
    """A batch's NLL, Brier score, entropy, highest probability, its class, and whether it is wrong.

    They are [M + 1, 6, B] on the CPU, of each member and of the members' mean.
    """
    each, y = checked_members(members, labels)
    every, kinds = [*each, torch.stack(each).mean(0)], [*members, members[0]]
    rows = [_row_scores(p, y, k.dtype) for p, k in zip(every, kinds, strict=True)]
    return torch.stack(rows).cpu()


def _row_scores(p: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    confidence, predicted = p.max(-1)
    one_hot = torch.zeros_like(p).scatter_(-1, y[:, None], 1.0)
    brier = (p - one_hot).square().sum(-1)
    scores = (nll_reference(p, y, dtype), brier, entropy_reference(p))
    return torch.stack([*scores, confidence, predicted.double(), (predicted != y).double()])


def _mean_scores(rows: Tensor, num_bins: int) -> PredictionScores:
    nll, brier, entropy, _, _, error = rows.mean(-1).tolist()
    confidence, wrong = rows[3], rows[5]
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device="cpu")
    bins = torch.bucketize(confidence, edges[1:-1])
    gaps = torch.bincount(bins, 1 - wrong - confidence, num_bins)
    ece = gaps.abs().sum().item() / len(confidence)
    return PredictionScores(error=error, nll=nll, brier=brier, ece=ece, entropy=entropy)


def checked_members(
    members: Tensor | Sequence[Tensor], labels: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Without gradients: the members' probabilities in float64, the labels as int64."""
    each: list[Tensor] = []
    for m, member in enumerate(members):
        p, y = checked_predictions(member, labels, f"members[{m}]")
        first = members[0]
        if member.shape != first.shape or member.device != first.device:
            raise ValueError(
                f"members[{m}] must be like the first member, {list(first.shape)} on "
                f"{first.device}, got {list(member.shape)} on {member.device}"
            )
        each.append(p)
    if not each:
        raise ValueError("members must hold at least one member, got none")
    return each, y


def checked_predictions(
    probabilities: Tensor, labels: Tensor, name: str = "probabilities"
) -> tuple[Tensor, Tensor]:
    """Without gradients: the probabilities in float64, the labels as int64."""
    check_matrix(name, probabilities)
    p = probabilities.detach().double()
    tolerance = 1e-3 if torch.finfo(probabilities.dtype).bits >= 32 else 2e-2
    lowest, total = p.amin(-1), p.sum(-1)
    check_rows(name, lowest, lowest >= 0, "be >= 0")
    check_rows(name, total, (total - 1).abs() <= tolerance, f"sum to 1 (+-{tolerance})")
    return p, checked_labels(labels, probabilities)


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise unless it is a floating-point tensor [B, C] that is not empty."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind_of(matrix)}")
    if matrix.dim() != 2 or len(matrix) < 1 or matrix.shape[1] < 2:
        raise ValueError(
            f"{name} must have shape [B, C], B >= 1 and C >= 2, got {tuple(matrix.shape)}. One "
            f"column p is made two by torch.cat([1 - p, p], 1), of logits z by "
            f"torch.cat([0 * z, z], 1)"
        )


def checked_labels(labels: Tensor, matrix: Tensor) -> Tensor:
    """The labels of a matrix [B, C] as int64; their values are checked on a GPU too."""
    y, classes = cast(Tensor, integer_labels(labels, matrix)), matrix.shape[1]
    check_rows("labels", y, (y >= 0) & (y < classes), f"be in 0..{classes - 1}")
    return y


def check_rows(name: str, found: Tensor, good: Tensor, expected: str) -> None:
    """Raise a ValueError that names the first row that is not good, and what was found there."""
    if not good.all():
        b = int(good.logical_not().nonzero()[0])
        raise ValueError(f"{name}[{b}] must {expected}, got {found[b].item()}")
