"""What a call takes, of rivals in turns: whatever else the machine does meets all of them.

A turn is a short burst of calls after one that is not timed: each rival then finds in the caches
what its own calls left there, not what another's did. On a GPU a burst ends when the device is idle
again. What moves bytes there is timed a second time, by the device alone: with other data in its
cache, which was only read, so that nothing is left to write back.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import fastfreeze
from benchmarks.case import Case, Run, refused

BURST, GPU_BURST, LEAST_ROUNDS = 3, 20, 7
LONG = 0.05  # seconds: a run of that length is no burst
WARM_UP = 0.5  # seconds until a clock frequency is what it is under load
FLUSHED_BYTES = 256 * 2**20  # more than any cache
CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep, at least
LONGEST_WAIT = 0.1  # seconds
FLOOR = "floor"


@dataclass(frozen=True)
class Times:
    """Seconds of one rival: median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """Of two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def _wait() -> None:
    """For a GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def burst_seconds(run: Run, burst: int = BURST) -> float:
    """Of a call, as it is in a loop of so many."""
    run()
    _wait()
    start = time.perf_counter()
    for _ in range(burst):
        run()
    _wait()
    return (time.perf_counter() - start) / burst


def device_seconds(run: Run) -> float:
    """Of a GPU for one call, which is in its queue before it begins."""
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(3 * host, LONGEST_WAIT) * CYCLES_PER_SECOND))
    trash, clean = _other_data()
    trash.zero_()
    clean.sum()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _other_data() -> tuple[Tensor, Tensor]:
    return tuple(torch.ones(FLUSHED_BYTES // 4, device="cuda") for _ in range(2))


def interleave(
    runs: Mapping[str, Run], rounds: int, seconds: Callable[[Run], float] = burst_seconds
) -> dict[str, Times]:
    """Time each run once a round, in an order that turns by one each round."""
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in in_turn(names, i):
            found[name].append(seconds(runs[name]))
    return {name: Times.of(values) for name, values in found.items()}


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """Another begins each turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def pace(runs: Mapping[str, Run], rounds: int, seconds: float) -> tuple[int, int]:
    """Calls in a burst, and rounds that fit in that time."""
    taken = [burst_seconds(run, burst=1) for run in runs.values()]
    burst = GPU_BURST if torch.cuda.is_initialized() else BURST
    burst = 1 if max(taken) > LONG else burst
    fitting = int(seconds / (sum(taken) * (burst + 1)))
    return burst, min(rounds, max(LEAST_ROUNDS, fitting))


def measured(case: Case, rounds: int, seconds: float, bandwidth: float) -> dict:
    """A case's entry in the results, given the bytes per second of a large copy.

    Each rival is timed ``rounds`` times (0: not at all), or as often as about fits in ``seconds``,
    but seven times in any case. A case that is refused gets no numbers.
    """
    entry: dict = {"name": case.name, "left_out": case.left_out, "seconds": {}}
    if refused(case.left_out) or rounds == 0:
        return entry
    runs = case.runs if case.floor is None else {**case.runs, FLOOR: case.floor}
    burst, rounds = pace(runs, rounds, seconds)
    times = interleave(runs, rounds, partial(burst_seconds, burst=burst))
    floor = None if case.bytes_moved is None else case.bytes_moved / bandwidth
    if case.floor is not None:
        floor = times.pop(FLOOR).median
    elif case.share is not None:
        rival, share = case.share
        floor = share * times[rival].median
    entry |= {"bytes": case.bytes_moved, "floor_s": floor, "rounds": rounds}
    entry["seconds"] = {rival: asdict(t) for rival, t in times.items()}
    if case.bytes_moved is not None and torch.cuda.is_initialized():
        found = interleave(case.runs, rounds, device_seconds)
        entry["device_s"] = {rival: asdict(t) for rival, t in found.items()}
    return entry


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second of a copy of 256 MB, counting what is read and what is written."""
    source = torch.randn(64 * 2**20, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        burst_seconds(copy)
    return 2 * source.nbytes / interleave({"copy": copy}, rounds=9)["copy"].median


def machine(device: str = "cpu") -> dict:
    """What numbers from this process were measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        **gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastfreeze": fastfreeze.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: *(.*)", info.read_text() if info.exists() else "", re.M)
    return found[1].strip() if found else platform.processor()
