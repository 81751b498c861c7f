"""Timing of rivals in turn, so that whatever else the machine does meets all of them.

A turn is a short burst of calls after one that is not timed: each rival then finds in the caches
what its own calls left there, not what another's did.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastfreeze


@dataclass(frozen=True)
class Times:
    """Seconds of one rival: median, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleave(
    runs: dict[str, Callable[[], object]], rounds: int, burst: int = 3
) -> dict[str, Times]:
    """Time a burst of each run once a round, in an order that turns by one each round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name]()
            start = time.perf_counter()
            for _ in range(burst):
                runs[name]()
            seconds[name].append((time.perf_counter() - start) / burst)
    return {name: quartiles(values) for name, values in seconds.items()}


def quartiles(values: list[float]) -> Times:
    """The median of two values or more, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median, low, high)


def machine() -> dict:
    """What numbers from this process's CPU were measured on."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastfreeze": fastfreeze.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
