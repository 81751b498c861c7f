"""Seconds of one run on a device: what the host takes to start it, and what the device works.

Cold: before the run the cache is filled with other data, which is only read, so that nothing is
left to write back. Warm: the same run was the last thing that the device did.
"""

from __future__ import annotations

import bisect
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from benchmarks.measure import quartiles

Run = Callable[[], object]
FLUSHED_BYTES = 256 * 2**20  # more than any cache
CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep, at least
LONGEST_WAIT = 0.1  # seconds


class CudaClock:
    """Times on the current CUDA device."""

    def __init__(self) -> None:
        self._trash = torch.empty(FLUSHED_BYTES // 4, device="cuda")
        self._clean = torch.ones(FLUSHED_BYTES // 4, device="cuda")

    def flush(self) -> None:
        """Leave nothing of earlier runs in the cache, nor anything that is yet to be written."""
        self._trash.zero_()
        self._clean.sum()

    def host(self, run: Run, repeats: int = 1) -> tuple[float, float]:
        """Seconds until the calls return, and until the device is idle again."""
        self.flush()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - start, time.perf_counter() - start

    def device(self, run: Run, wait: float, warm: bool) -> tuple[float, bool]:
        """Seconds from the first launch to the last, and whether all were in the queue before."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        self.flush()
        if warm:
            run()
        begin.record()
        run()
        end.record()
        in_time = not begin.query()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, in_time

    def profile(self, runs: dict[str, Run]) -> dict[str, dict]:
        """Of each run: its kernels, copies and fills, and their seconds, without gaps; {} if not
        allowed.
        """
        names = list(runs)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for i, name in enumerate(names):
                with torch.profiler.record_function(f"run {i}"):
                    runs[name]()
                    torch.cuda.synchronize()
        events = profile.events()
        starts = sorted(
            e.time_range.start
            for e in events
            if e.name.startswith("run ") and e.device_type == torch.autograd.DeviceType.CPU
        )
        found: dict[str, list[float]] = {name: [] for name in names}
        for e in events:
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation:
                at = bisect.bisect_right(starts, e.time_range.start) - 1
                found[names[max(at, 0)]].append(e.time_range.elapsed_us() / 1e6)
        if not any(found.values()):
            return {}
        return {n: {"launches": len(s), "kernels_s": sum(s)} for n, s in found.items()}


class CpuClock:
    """For dry runs without a GPU: the device is the host."""

    def host(self, run: Run, repeats: int = 1) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = time.perf_counter() - start
        return seconds, seconds

    def device(self, run: Run, wait: float, warm: bool) -> tuple[float, bool]:
        return self.host(run)[0], True

    def profile(self, runs: dict[str, Run]) -> dict[str, dict]:
        return {}


Clock = CudaClock | CpuClock


def measure(clock: Clock, runs: dict[str, Run], rounds: int, seconds: float = 10) -> dict:
    """Each run's times, in turns: once a round, in an order that rotates.

    ``late`` counts the measurements of the device in which it did not have to wait for the host
    only because the host was late: gaps are then in its seconds.

    Args:
        clock: of the device.
        runs: by name.
        rounds: as many, or as fit into the time, at least 3.
        seconds: the time.
    """
    waits = {}
    for name, run in runs.items():
        hosts = [clock.host(run)[0] for _ in range(3)]
        waits[name] = min(3 * min(hosts[1:]), LONGEST_WAIT)
    kinds = ("host_s", "wall_s", "cold_s", "warm_s")
    times: dict[str, dict[str, list[float]]] = {n: {k: [] for k in kinds} for n in runs}
    late = dict.fromkeys(runs, 0)
    for names in _turns(list(runs), rounds, seconds):
        for name in names:
            run, of = runs[name], times[name]
            host, wall = clock.host(run)
            cold, cold_in_time = clock.device(run, waits[name], warm=False)
            warm, warm_in_time = clock.device(run, 2 * waits[name], warm=True)
            for kind, value in zip(kinds, (host, wall, cold, warm), strict=True):
                of[kind].append(value)
            late[name] += (not cold_in_time) + (not warm_in_time)
    profile = _profiled(clock, runs)
    return {
        name: {
            **{kind: asdict(quartiles(values)) for kind, values in of.items()},
            "wait_s": waits[name],
            "late": late[name],
            "rounds": len(of["host_s"]),
            **profile.get(name, {}),
        }
        for name, of in times.items()
    }


def measure_loop(
    clock: Clock, runs: dict[str, Run], repeats: int, rounds: int, seconds: float = 10
) -> dict:
    """Each run's seconds in a loop of so many, as in a training: the host runs ahead."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for names in _turns(list(runs), rounds, seconds):
        for name in names:
            for values, value in zip(times[name], clock.host(runs[name], repeats), strict=True):
                values.append(value / repeats)
    profile = _profiled(clock, runs)
    return {
        name: {
            "host_s": asdict(quartiles(host)),
            "loop_s": asdict(quartiles(wall)),
            "rounds": len(wall),
            **profile.get(name, {}),
        }
        for name, (host, wall) in times.items()
    }


def _profiled(clock: Clock, runs: dict[str, Run]) -> dict[str, dict]:
    """What the profile says; times that are known do without it."""
    try:
        return clock.profile(runs)
    except Exception as error:
        return {name: {"no_profile": repr(error)} for name in runs}


def _turns(names: list[str], rounds: int, seconds: float) -> Iterator[list[str]]:
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > seconds:
            return
        yield names[i % len(names) :] + names[: i % len(names)]


def ground(clock: Clock, device: str, elements: int) -> dict:
    """What the times are to be seen beside: the device, warmed up, copying much or doing nothing.

    Args:
        clock: of the device.
        device: "cuda" or "cpu".
        elements: of the fp32 tensor that is copied.
    """
    before = clocks(device)
    warm_up(device, 1.5)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = measure(clock, {"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return {
        "clocks_before": before,
        "copy_bytes_per_s": 2 * source.nbytes / copy["cold_s"]["median"],
        "nothing": measure(clock, _nothing(device), rounds=41),
        "clocks_after": clocks(device),
    }


def warm_up(device: str, seconds: float) -> None:
    """Products of matrices, until the clock frequency is what it is under load."""
    n = 8192 if device == "cuda" else 64
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + (seconds if device == "cuda" else 0)
    while True:
        for _ in range(10):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() >= end:
            return


def _nothing(device: str) -> dict[str, Run]:
    """What events, a launch and a replay of a graph take by themselves."""
    if device != "cuda":
        return {"empty kernel": lambda: None}

    def empty() -> None:
        torch.cuda._sleep(0)

    return {"empty kernel": empty, "graph of an empty kernel": captured(empty, device)}


def clocks(device: str) -> str | None:
    """Frequencies, power and temperature now, as nvidia-smi tells."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return None if device != "cuda" else output_of(command)


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None if there is none such, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def captured(run: Run, device: str) -> Run:
    """The run as a CUDA graph; making it takes no step. A dry run on a CPU takes the run itself."""
    if device != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_owner: Run = run) -> None:  # whose tensors the graph reads and writes
        graph.replay()

    return replay


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int | None]]:
    """Bytes that are held at most in the block, beyond those at its start."""
    if device != "cuda":
        yield lambda: None
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() - before
