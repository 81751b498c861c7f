"""What arguments must be, wherever they are given."""

from __future__ import annotations

from typing import Any


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise TypeError or ValueError unless it is an int in ``minimum..maximum``; bools are none."""
    wanted = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {wanted}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {wanted}, got {value}")
