"""What numbers among the arguments of schedules must be."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat


def check_number(name: str, value: Any, wanted: str) -> None:
    """What ``float`` takes, NumPy's numbers and tensors of one element among it, but no text."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    check_number(name, value, ">= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
