"""What arguments of schedules must be."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    wanted = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {wanted}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_number(name: str, value: Any, wanted: str) -> None:
    """What ``float`` takes, NumPy's numbers and tensors of one element among it, but no text."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    check_number(name, value, ">= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
