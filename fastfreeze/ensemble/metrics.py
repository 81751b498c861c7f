"""How good predicted probabilities are, and how much members differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfreeze.ops._softmax_arguments import kind_of
from fastfreeze.snapshots.base import check_count


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
    return nll_of_rows(p, y, probabilities.dtype).mean().item()


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
    check_count("num_bins", num_bins, minimum=1)
    return ece_of_rows(*confidence_and_correct(probabilities, labels), num_bins)


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """:func:`expected_calibration_error` with bins of equal mass, in 0..1.

    Rows are sorted by their highest probability and cut into ``num_bins`` runs whose lengths
    differ by at most one (Nguyen & O'Connor, EMNLP 2015); the result is the mean over rows of
    \\|accuracy - mean confidence\\| of the row's run. The adaptive error of Nixon et al. (CVPR
    workshops, 2019) is its mean over all classes' probabilities; here the highest alone counts.

    Rows of equal confidence are each as often right as they are on average, so that it does not
    matter in which order they come, nor which of them a cut sends to which run. With B <= num_bins
    each row is a run of its own, and the result says little.

    Args:
        probabilities, labels: as in :func:`error_rate`.
        num_bins: >= 1.

    Raises:
        TypeError, ValueError: as from :func:`error_rate`, or ``num_bins`` is not a count.
    """
    check_count("num_bins", num_bins, minimum=1)
    return ace_of_rows(*confidence_and_correct(probabilities, labels), num_bins)


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
    if isinstance(members, Tensor) and members.dim() != 3:
        raise ValueError(f"members must have shape [M, B, C], got {tuple(members.shape)}")
    if len(members) == 0:
        raise ValueError("members must hold at least one member, got none")
    classes = []
    for m, member in enumerate(members):
        name = f"members[{m}]"
        classes.append(checked_probabilities(name, member).argmax(-1))
        check_like_first(name, member, members[0])
    return num_differing(torch.stack(classes)).double() / classes[0].numel()


def nll_of_rows(p: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[B], of probabilities that were computed in ``dtype``; see :func:`nll`."""
    of_label = p.gather(-1, y[:, None]).squeeze(-1)
    return -of_label.clamp(min=torch.finfo(dtype).tiny).log()


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


def ace_of_rows(confidence: Tensor, correct: Tensor, num_bins: int) -> float:
    """See :func:`adaptive_calibration_error`."""
    values, tie, counts = confidence.unique(return_inverse=True, return_counts=True)
    accuracy = torch.bincount(tie, correct.double()) / counts
    gap = (accuracy - values).repeat_interleave(counts)  # of each row, in the order of confidence
    bins = torch.arange(len(gap), device=gap.device) * num_bins // len(gap)
    return torch.bincount(bins, gap).abs().sum().item() / len(gap)


def num_differing(classes: Tensor) -> Tensor:
    """Of predicted classes [M, B], how many differ between two members: [M, M], int64."""
    return torch.stack([(classes != of_one).sum(-1) for of_one in classes])


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
    check_matrix(name, probabilities)
    y = checked_labels(labels, probabilities)
    return checked_probabilities(name, probabilities), y


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
    """The labels of the rows of a matrix [B, C] as int64."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of integers, got {kind_of(labels)}")
    if labels.shape != matrix.shape[:1] or labels.device != matrix.device:
        raise ValueError(
            f"labels must have shape [{len(matrix)}] on {matrix.device}, "
            f"got {list(labels.shape)} on {labels.device}"
        )
    y, classes = labels.long(), matrix.shape[1]
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
