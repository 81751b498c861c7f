"""How good predicted probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfreeze.ensemble._checks import check_count


def error_rate(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows, in 0..1, whose most probable class (the first, if tied) is not the label.

    Args:
        probabilities: [B, C], B >= 1, floating point, rows summing to 1.
        labels: [B], integers in 0..C-1.

    Raises:
        TypeError, ValueError: they are not; the message names the row.
    """
    p, y = _checked_predictions(probabilities, labels)
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
    p, y = _checked_predictions(probabilities, labels)
    of_label = p.gather(-1, y[:, None]).clamp(min=torch.finfo(probabilities.dtype).tiny)
    return -of_label.log().mean().item()


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
    p, y = _checked_predictions(probabilities, labels)
    confidence, predicted = (t.cpu() for t in p.max(-1))
    inner_edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidence, inner_edges)
    gap = (predicted == y.cpu()).double() - confidence
    return torch.bincount(bins, weights=gap).abs().sum().item() / len(gap)


def _checked_predictions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both, without gradients: the probabilities in float64, the labels as int64."""
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        found = getattr(probabilities, "dtype", type(probabilities).__name__)
        raise TypeError(f"probabilities must be a floating-point tensor, got {found}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        found = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"labels must be a tensor of integers, got {found}")
    if probabilities.dim() != 2 or probabilities.numel() == 0:
        shape = tuple(probabilities.shape)
        raise ValueError(f"probabilities must have shape [B, C], B and C >= 1, got {shape}")
    if labels.shape != probabilities.shape[:1] or labels.device != probabilities.device:
        raise ValueError(
            f"labels must have shape [{len(probabilities)}] on {probabilities.device}, "
            f"got {list(labels.shape)} on {labels.device}"
        )
    p, y = probabilities.detach().double(), labels.long()
    tolerance = 1e-3 if torch.finfo(probabilities.dtype).bits >= 32 else 2e-2
    lowest, total, classes = p.amin(-1), p.sum(-1), p.shape[1]
    _check_rows("probabilities", lowest, lowest >= 0, "be >= 0")
    near_1 = (total - 1).abs() <= tolerance
    _check_rows("probabilities", total, near_1, f"sum to 1 (+-{tolerance})")
    _check_rows("labels", y, (y >= 0) & (y < classes), f"be in 0..{classes - 1}")
    return p, y


def _check_rows(name: str, found: Tensor, good: Tensor, expected: str) -> None:
    if not good.all():
        b = int(good.logical_not().nonzero()[0])
        raise ValueError(f"{name}[{b}] must {expected}, got {found[b].item()}")
