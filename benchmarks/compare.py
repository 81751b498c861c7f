"""Measure the rivals of a case in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict

import torch

from benchmarks.case import Case, Run
from benchmarks.lines import Line, lines_of
from benchmarks.measure import Times, interleave

FLOOR = "floor"
LEAST_ROUNDS = 7
BURST = 3
LONG = 0.05  # seconds: a run of that length is no burst


def measured(case: Case, rounds: int, seconds: float, bandwidth: float) -> dict:
    """A case's entry in the results.

    Args:
        case: with its rivals; one that is refused gets no numbers.
        rounds: how often each is timed, at most.
        seconds: about how long that may take; seven rounds are made in any case.
        bandwidth: bytes per second of a large copy.
    """
    entry = {"name": case.name, "left_out": case.left_out}
    if case.refused:
        return {**entry, "seconds": {}}
    runs = case.runs if case.floor is None else {**case.runs, FLOOR: case.floor}
    burst, rounds = pace(runs, rounds, seconds)
    times = interleave(runs, rounds, burst)
    floor = None if case.bytes_moved is None else case.bytes_moved / bandwidth
    if case.floor is not None:
        floor = times.pop(FLOOR).median
    return {
        **entry,
        "bytes": case.bytes_moved,
        "floor_s": floor,
        "rounds": rounds,
        "seconds": {rival: asdict(t) for rival, t in times.items()},
    }


def pace(runs: Mapping[str, Run], rounds: int, seconds: float) -> tuple[int, int]:
    """Calls in a burst, and rounds that fit in that time."""
    taken = []
    for run in runs.values():
        run()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    burst = 1 if max(taken) > LONG else BURST
    fitting = int(seconds / (sum(taken) * (burst + 1)))
    return burst, min(rounds, max(LEAST_ROUNDS, fitting))


def lines_of_entry(key: str, entry: dict) -> list[Line]:
    """Lines of the table for a case's entry in the results."""
    times = {rival: Times(**t) for rival, t in entry["seconds"].items()}
    return lines_of(entry["name"], key, times, entry.get("floor_s"))


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 256 MB, counting what is read and what is written."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.numel() * 4 / times.median
