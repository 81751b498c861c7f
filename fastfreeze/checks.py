"""What arguments must be, wherever they are given."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise TypeError or ValueError unless it is an int in ``minimum..maximum``; bools are none."""
    wanted = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {wanted}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_float(name: str, value: Any, wanted: str) -> None:
    """Raise TypeError unless ``float`` takes it; text and bools are no numbers."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless it is a finite number >= 0."""
    check_float(name, value, ">= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless it is a number in (0, 1]."""
    check_float(name, value, "in (0, 1]")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
