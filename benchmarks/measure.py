"""Timing of rivals in turn, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of one rival: median, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Time each run once a round, in an order that turns by one each round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: _times(values) for name, values in seconds.items()}


def _times(values: list[float]) -> Times:
    low, median, high = statistics.quantiles(values, n=4)
    return Times(median, low, high)
