"""The temperature: one number that makes probabilities as sure as they are right.

Source of the method: On Calibration of Modern Neural Networks (Guo et al., ICML 2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastfreeze.ensemble.scores import (
    check_matrix,
    check_rows,
    checked_labels,
    checked_predictions,
)
from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax_arguments import check_classes, kind_of

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0
_TOLERANCE = 1e-10  # relative
_BLOCK = 2**16  # numbers: temporaries of that size stay in the cache
_NO_WEIGHT = -1e5  # so far below its row's highest a logit has no probability at any temperature


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which ``softmax(logits / T)`` has the lowest NLL (Guo et al., 2017).

    Computed in float64. The NLL is convex in 1 / T, so there is one minimum.

    Args:
        logits: [B, C], B >= 1, C >= 2, floating point: logits or logarithms of probabilities.
            ``-inf`` masks a class.
        labels: [B], integers in 0..C-1, of classes that are not masked.

    Returns:
        T in 0.01..100: the lower bound if the NLL still falls there, as where every label has the
        highest logit of its row; the upper one if it falls all the way up, as where the logits
        mislead; 1.0 if T changes nothing, as where each row's logits are all equal.

    Raises:
        TypeError, ValueError: ``logits`` or ``labels`` are not such; the message names the row.
    """
    check_matrix("logits", logits)
    y = checked_labels(labels, logits)
    z = logits.detach().double()
    highest = z.amax(-1)  # NaN if one is
    check_rows("logits", highest, highest.isfinite(), "have a finite maximum")
    of_label = z.gather(-1, y[:, None]).squeeze(-1)
    check_rows("logits", of_label, of_label.isfinite(), "be finite at the label")
    return _lowest_nll(z - highest[:, None], of_label - highest)


def _lowest_nll(z: Tensor, of_label: Tensor) -> float:
    """The temperature of rows whose highest logit is 0, by Newton's method in b = 1 / T.

    Where Newton's step leaves the bracket of b, or the slope does not halve, the bracket is cut at
    its geometric mean instead.
    """
    z = z.clamp(min=_NO_WEIGHT)
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    slope_low, slope_high = (_derivatives(z, of_label, b)[0] for b in (low, high))
    if slope_low == slope_high == 0:
        return 1.0
    if slope_low >= 0:
        return MAX_TEMPERATURE
    if slope_high <= 0:
        return MIN_TEMPERATURE
    b, previous = 1.0, math.inf
    while high / low > 1 + _TOLERANCE:
        slope, curvature = _derivatives(z, of_label, b)
        low, high = (b, high) if slope < 0 else (low, b)
        newton = b - slope / curvature if curvature > 0 else math.inf
        if abs(newton - b) <= _TOLERANCE * b:
            break
        trusted = low < newton < high and abs(slope) <= previous / 2
        b, previous = newton if trusted else math.sqrt(low * high), abs(slope)
    return 1 / b


def _derivatives(z: Tensor, of_label: Tensor, b: float) -> tuple[float, float]:
    """First and second derivative of the NLL of ``softmax(b * z)`` with respect to b.

    They are the mean over rows of E[z] - z[label], and of the variance of z, under that softmax.
    """
    rows = max(1, _BLOCK // z.shape[1])
    slope = curvature = z.new_zeros(())
    for block in z.split(rows):
        p = torch.softmax(b * block, dim=-1)
        mean = (p * block).sum(-1, keepdim=True)
        slope = slope + mean.sum()
        curvature = curvature + p.mul_((block - mean).square_()).sum()
    slope = slope - of_label.sum()
    return slope.item() / len(z), curvature.item() / len(z)


class TemperatureScaling(nn.Module):
    """Gives probabilities a temperature: softmax(log(p) / T), fitted on held-out data.

    Of an ensemble, fit it to the mean of the members' probabilities: the mean of members that are
    calibrated one by one is underconfident (Rahaman & Thiery, NeurIPS 2021). The most probable
    class stays the same.

    Attributes:
        temperature: float32 scalar, a buffer; 1 until :meth:`fit`.

    Example:
        >>> scaling = TemperatureScaling().fit(ensemble(x_valid), y_valid)
        >>> probabilities = scaling(ensemble(x_test))
    """

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))

    def fit(self, probabilities: Tensor, labels: Tensor) -> TemperatureScaling:
        """Set the temperature to that of the lowest NLL; see :func:`fit_temperature`.

        A label's probability of 0 counts as the smallest normal number of its dtype.

        Args:
            probabilities: [B, C], B >= 1, C >= 2, floating point, rows summing to 1, of data on
                which the members were not trained.
            labels: [B], integers in 0..C-1.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: they are not such; the temperature is left as it was.
        """
        p, y = checked_predictions(probabilities, labels)
        at_label = p.gather(-1, y[:, None]).clamp(min=torch.finfo(probabilities.dtype).tiny)
        temperature = fit_temperature(p.scatter(-1, y[:, None], at_label).log(), y)
        with torch.no_grad():
            self.temperature.fill_(temperature)
        return self

    def forward(self, probabilities: Tensor, *, dim: int | None = None) -> Tensor:
        """The probabilities at the fitted temperature.

        Computed in float32 (float64 for float64 probabilities) and rounded once. A probability of
        0 stays 0.

        Args:
            probabilities: [..., C], floating point, on the module's device, each row with one > 0.
                Their values are not looked at: a row with a negative one comes out NaN.
            dim: of the classes, C >= 2, as in :func:`~fastfreeze.ensemble_softmax`.

        Returns:
            [..., C], of the dtype of ``probabilities``.

        Raises:
            TypeError: ``probabilities`` is not a floating-point tensor, or ``dim`` no int.
            ValueError: ``dim`` is missing or none of theirs, or there is one class alone.
        """
        if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
            found = kind_of(probabilities)
            raise TypeError(f"probabilities must be a floating-point tensor, got {found}")
        check_classes("probabilities", probabilities, dim)
        dtype = sum_dtype(probabilities.dtype)
        scaled = probabilities.to(dtype).log() / self.temperature.to(dtype)
        return scaled.softmax(-1 if dim is None else dim).to(probabilities.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature.item():.4g}"
