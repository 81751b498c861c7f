"""How good predicted probabilities are, and how much members differ: of rows, and in one pass."""

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


def error_rate(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows, in 0..1, whose most probable class (the first, if tied) is not the label.

    Args:
        probabilities: [B, C], B >= 1, C >= 2, floating point, rows summing to 1. Of one column p,
            as a sigmoid gives, ``torch.cat([1 - p, p], 1)`` makes two.
        labels: [B], integers in 0..C-1.

    Raises:
        TypeError, ValueError: they are not; the message names the row.
    """
    p, y = checked_predictions(probabilities, labels)
    return (p.argmax(-1) != y).double().mean().item()


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative natural logarithm of the label's probability, summed in float64.

    A probability below the smallest normal number of its dtype counts as that number, so that the
    result is finite: a row costs at most 87.3 in float32 and bfloat16, 9.7 in float16, 708.4 in
    float64.

    Args:
        probabilities, labels: as in :func:`error_rate`.

    Raises:
        TypeError, ValueError: as from :func:`error_rate`.
    """
    p, y = checked_predictions(probabilities, labels)
    return nll_reference(p, y, probabilities.dtype).mean().item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over rows of the squared distance to the one-hot label, in 0..2, in float64.

    The sum runs over all classes, as in Brier (Monthly Weather Review, 1950); for two classes that
    is twice what is often given for the probability of one of them.

    Args:
        probabilities, labels: as in :func:`error_rate`.

    Raises:
        TypeError, ValueError: as from :func:`error_rate`.
    """
    p, y = checked_predictions(probabilities, labels)
    return brier_of_rows(p, y).mean().item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al., ICML 2017, eq. 3), in 0..1.

    Rows are sorted into equal bins (i / num_bins, (i + 1) / num_bins] by their highest
    probability; the result is the mean over rows of \\|accuracy - mean confidence\\| of the row's
    bin.

    Args:
        probabilities, labels: as in :func:`error_rate`.
        num_bins: >= 1.

    Raises:
        TypeError, ValueError: as from :func:`error_rate`, or ``num_bins`` is not a count.
    """
    check_int("num_bins", num_bins, minimum=1)
    return ece_of_rows(*confidence_and_correct(probabilities, labels), num_bins)


def disagreement(members: Tensor | Sequence[Tensor]) -> Tensor:
    """Share of rows on which the most probable classes of two members differ.

    Args:
        members: probabilities of M >= 1 members, as one tensor [M, B, C] or a sequence of M
            tensors [B, C] of one shape and device, each as in :func:`error_rate`.

    Returns:
        [M, M], float64, in 0..1, on the members' device: symmetric, with a diagonal of zeros.

    Raises:
        TypeError, ValueError: the members are not such; the message names the member and the row.
    """
    check_members(members)
    classes = []
    for m, member in enumerate(members):
        name = f"members[{m}]"
        classes.append(checked_probabilities(name, member).argmax(-1))
        check_like_first(name, member, members[0])
    return num_differing(classes).double() / classes[0].numel()


class GivesMemberProbabilities(Protocol):
    """What can be evaluated: a SnapshotEnsemble, or anything with this method."""

    @property
    def member_probabilities(self) -> Callable[..., Iterable[Tensor]]:
        """A method that gives the probabilities [B, C] of each member in turn."""


@dataclass(frozen=True)
class PredictionScores:
    """How good the predictions of a member, or of the ensemble, are.

    Attributes:
        error: share of rows, in 0..1; see :func:`~fastfreeze.ensemble.error_rate`.
        nll: in nats; see :func:`~fastfreeze.ensemble.nll`.
        brier: in 0..2; see :func:`~fastfreeze.ensemble.brier_score`.
        ece: in 0..1; see :func:`~fastfreeze.ensemble.expected_calibration_error`.
        entropy: mean over rows, in nats.
    """

    error: float
    nll: float
    brier: float
    ece: float
    entropy: float


@dataclass(frozen=True, eq=False)
class EnsembleEvaluation:
    """What :func:`evaluate` finds; ``print`` gives a table.

    Attributes:
        members: the scores of each member.
        ensemble: those of the mean of their probabilities.
        mutual_information: mean over rows, in nats: what of the ensemble's entropy is disagreement
            of the members, the rest being the mean of their own entropies. Never negative.
        disagreement: [M, M], float64, on the CPU; see :func:`~fastfreeze.ensemble.disagreement`.
        num_rows: how many rows there were.
        num_bins: bins of the calibration error.
    """

    members: tuple[PredictionScores, ...]
    ensemble: PredictionScores
    mutual_information: float
    disagreement: Tensor
    num_rows: int
    num_bins: int

    @property
    def mean_disagreement(self) -> float:
        """Mean over pairs of different members, in 0..1; 0 for a single member."""
        M = len(self.members)
        return self.disagreement.sum().item() / max(1, M * (M - 1))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts alone, for JSON."""
        return {
            "members": [asdict(scores) for scores in self.members],
            "ensemble": asdict(self.ensemble),
            "mutual_information": self.mutual_information,
            "disagreement": self.disagreement.tolist(),
            "num_rows": self.num_rows,
            "num_bins": self.num_bins,
        }

    def __str__(self) -> str:
        named = {f"member {m}": scores for m, scores in enumerate(self.members)}
        named["ensemble"] = self.ensemble
        headers = ["", "error %", "NLL", "Brier", "ECE", "entropy"]
        rows = [
            [name, f"{100 * s.error:.2f}", *(f"{x:.4f}" for x in list(asdict(s).values())[1:])]
            for name, s in named.items()
        ]
        return (
            f"{format_table(headers, rows)}\n\n"
            f"{self.num_rows} rows; two members differ on {100 * self.mean_disagreement:.2f}% of "
            f"them; mutual information {self.mutual_information:.4f} nats"
        )


@torch.no_grad()
def evaluate(
    ensemble: GivesMemberProbabilities, batches: Iterable[Any], *, num_bins: int = 15
) -> EnsembleEvaluation:
    """Score each member of an ensemble, and the mean of their probabilities, on labelled data.

    One pass over the data and one call per batch. Between batches it keeps five numbers of each row
    and member. All is computed in float64. The members' mean is taken with equal weights; its NLL
    has the floor of the members' dtype, as theirs.

    Args:
        ensemble: anything whose ``member_probabilities(*inputs)`` gives the probabilities [B, C] of
            each member in turn, as those of :func:`~fastfreeze.ensemble.error_rate`: always the
            same members.
        batches: pairs (inputs, labels), or dicts of which one item is "labels", on the ensemble's
            device, such as a ``DataLoader`` gives; labels are integers [B] in 0..C-1. A tuple or
            list of inputs is passed as several arguments, a dict by name.
        num_bins: of the calibration error, >= 1.

    Raises:
        TypeError, ValueError: no batch, a batch or a prediction that is not such, or ``num_bins``
            is not a count; the message names the member and the row.
    """
    check_int("num_bins", num_bins, minimum=1)
    scored: list[_Batch] = []
    for i, batch in enumerate(batches):
        (inputs, keywords), labels = call_and_labels(f"batches[{i}]", batch)
        if labels is None:
            raise TypeError(
                f'batches must give pairs (inputs, labels), or dicts with "labels", '
                f"got {_described(batch)}"
            )
        members = list(ensemble.member_probabilities(*inputs, **keywords))
        count = len(scored[0].rows) - 1 if scored else max(1, len(members))
        if len(members) != count:
            raise ValueError(
                f"ensemble must give the same members for every batch, at least one: expected "
                f"{count}, got {len(members)}"
            )
        scored.append(_scored(members, labels))
    if not scored:
        raise ValueError("batches must give at least one batch, got none")
    rows = torch.cat([batch.rows for batch in scored], -1)
    *each, mean = (_scores(of_one, num_bins) for of_one in rows)
    num_rows = rows.shape[-1]
    return EnsembleEvaluation(
        members=tuple(each),
        ensemble=mean,
        mutual_information=torch.cat([b.mutual_information for b in scored]).mean().item(),
        disagreement=torch.stack([b.num_differing for b in scored]).sum(0).double() / num_rows,
        num_rows=num_rows,
        num_bins=num_bins,
    )


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} of {', '.join(map(repr, batch))}"
    return f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {kind}"


@dataclass(frozen=True, eq=False)
class _Batch:
    """What is kept of a batch, on the CPU.

    Attributes:
        rows: [M + 1, 5, B], of each member and of their mean: NLL, Brier score, entropy, the
            highest probability, and 1 where its class is not the label.
        mutual_information: [B].
        num_differing: [M, M].
    """

    rows: Tensor
    mutual_information: Tensor
    num_differing: Tensor


def _scored(members: list[Tensor], labels: Tensor) -> _Batch:
    each: list[Tensor] = []
    for m, member in enumerate(members):
        p, y = checked_predictions(member, labels, f"members[{m}]")
        check_like_first(f"members[{m}]", member, members[0])
        each.append(p)
    every, kinds = [*each, torch.stack(each).mean(0)], [*members, members[0]]
    rows = torch.stack([_row_scores(p, y, k.dtype) for p, k in zip(every, kinds, strict=True)])
    information = mutual_information_reference(rows[-1, 2], rows[:-1, 2].mean(0))
    differing = num_differing([p.argmax(-1) for p in each])
    return _Batch(rows.cpu(), information.cpu(), differing.cpu())


def _row_scores(p: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    confidence, predicted = p.max(-1)
    wrong = (predicted != y).double()
    scores = (nll_reference(p, y, dtype), brier_of_rows(p, y), entropy_reference(p))
    return torch.stack([*scores, confidence, wrong])


def _scores(rows: Tensor, num_bins: int) -> PredictionScores:
    nll, brier, entropy, _, error = rows.mean(-1).tolist()
    ece = ece_of_rows(rows[3], 1 - rows[4], num_bins)
    return PredictionScores(error=error, nll=nll, brier=brier, ece=ece, entropy=entropy)


def brier_of_rows(p: Tensor, y: Tensor) -> Tensor:
    """[B]; see :func:`brier_score`."""
    one_hot = torch.zeros_like(p).scatter_(-1, y[:, None], 1.0)
    return (p - one_hot).square().sum(-1)


def confidence_and_correct(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The highest probability of each row, [B] in float64, and whether its class is the label."""
    p, y = checked_predictions(probabilities, labels)
    confidence, predicted = p.max(-1)
    return confidence.cpu(), (predicted == y).cpu()


def sums_in_bins(
    confidence: Tensor, correct: Tensor, num_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, sum of confidence and rows that are right, each [num_bins], of equal bins of 0..1."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])
    return (
        torch.bincount(bins, minlength=num_bins),
        torch.bincount(bins, confidence, num_bins),
        torch.bincount(bins, correct.double(), num_bins),
    )


def ece_of_rows(confidence: Tensor, correct: Tensor, num_bins: int) -> float:
    """See :func:`expected_calibration_error`."""
    _, sum_confidence, num_correct = sums_in_bins(confidence, correct, num_bins)
    return (num_correct - sum_confidence).abs().sum().item() / len(confidence)


def num_differing(classes: Sequence[Tensor]) -> Tensor:
    """Of M members' predicted classes [B], how many differ between two: [M, M], int64."""
    each = torch.stack(list(classes))
    return torch.stack([(each != of_one).sum(-1) for of_one in each])


def check_members(members: Tensor | Sequence[Tensor]) -> None:
    """Raise a ValueError unless it is a tensor [M, B, C] or a sequence, of M >= 1."""
    if isinstance(members, Tensor) and members.dim() != 3:
        raise ValueError(f"members must have shape [M, B, C], got {tuple(members.shape)}")
    if len(members) == 0:
        raise ValueError("members must hold at least one member, got none")


def check_like_first(name: str, member: Tensor, first: Tensor) -> None:
    """Raise a ValueError unless a member's shape and device are those of the first."""
    if member.shape != first.shape or member.device != first.device:
        raise ValueError(
            f"{name} must be like the first member, {list(first.shape)} on {first.device}, "
            f"got {list(member.shape)} on {member.device}"
        )


def checked_predictions(
    probabilities: Tensor, labels: Tensor, name: str = "probabilities"
) -> tuple[Tensor, Tensor]:
    """Both, without gradients: the probabilities in float64, the labels as int64."""
    p = checked_probabilities(name, probabilities)
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
    """The labels of the rows of a matrix [B, C] as int64, looked at on a GPU too."""
    y, classes = cast(Tensor, integer_labels(labels, matrix)), matrix.shape[1]
    check_rows("labels", y, (y >= 0) & (y < classes), f"be in 0..{classes - 1}")
    return y


def checked_probabilities(name: str, probabilities: Tensor) -> Tensor:
    """They themselves, in float64 and without gradients."""
    check_matrix(name, probabilities)
    p = probabilities.detach().double()
    tolerance = 1e-3 if torch.finfo(probabilities.dtype).bits >= 32 else 2e-2
    lowest, total = p.amin(-1), p.sum(-1)
    check_rows(name, lowest, lowest >= 0, "be >= 0")
    check_rows(name, total, (total - 1).abs() <= tolerance, f"sum to 1 (+-{tolerance})")
    return p


def check_rows(name: str, found: Tensor, good: Tensor, expected: str) -> None:
    """Raise a ValueError that names the first row that is not good, and what was found there."""
    if not good.all():
        b = int(good.logical_not().nonzero()[0])
        raise ValueError(f"{name}[{b}] must {expected}, got {found[b].item()}")
