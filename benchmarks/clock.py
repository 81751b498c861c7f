"""Seconds of one run on a device: what the host waits, and what the device works.

Before each run the cache is overwritten, so that every run finds its data in memory alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.measure import quartiles

Run = Callable[[], object]
FLUSHED_BYTES = 512 * 2**20  # more than any cache
CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep, at least
LONGEST_WAIT = 0.02  # seconds


class CudaClock:
    """Times on the current CUDA device."""

    def __init__(self) -> None:
        self._trash = torch.empty(FLUSHED_BYTES // 4, device="cuda")

    def wall(self, run: Run) -> float:
        """From the call until the device is idle again."""
        self._trash.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def device(self, run: Run, wait: float) -> float:
        """From the first launch to the last, all of them in the queue before the first begins."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(wait, LONGEST_WAIT) * CYCLES_PER_SECOND))
        self._trash.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def launches(self, run: Run) -> int | None:
        """Kernels, copies and fills that one run starts; None where profiling is not allowed."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        events = [e for e in profile.events() if e.device_type == on_device]
        return sum(not e.is_user_annotation for e in events) or None


class CpuClock:
    """For dry runs without a GPU: the device is the host."""

    def wall(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def device(self, run: Run, wait: float) -> float:
        return self.wall(run)

    def launches(self, run: Run) -> int | None:
        return None


Clock = CudaClock | CpuClock


def measure(clock: Clock, runs: dict[str, Run], rounds: int) -> dict[str, dict]:
    """Each run's wall and device seconds, in turns: once a round, in an order that rotates."""
    names = list(runs)
    waits = {name: 3 * min(clock.wall(runs[name]) for _ in range(3)) for name in names}
    seconds: dict[str, dict[str, list[float]]] = {n: {"wall": [], "device": []} for n in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name]["wall"].append(clock.wall(runs[name]))
            seconds[name]["device"].append(clock.device(runs[name], waits[name]))
    return {
        name: {
            "wall_s": asdict(quartiles(times["wall"])),
            "device_s": asdict(quartiles(times["device"])),
            "launches": clock.launches(runs[name]),
        }
        for name, times in seconds.items()
    }


def copy_bandwidth(clock: Clock, device: str, elements: int) -> float:
    """Bytes per second of a large copy, counting what is read and what is written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times = measure(clock, {"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.nbytes / times["device_s"]["median"]
