"""The two passes over the runs that are missing: errors, several at once, and costs, alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.worth.question import Part, Run, load
from fastfreeze.clock import cpu_seconds

ROUNDS = 3
TIMES = ("seconds", "predict_ms")  # what a record may tell that an idle machine is for
OTHERS = 0.05  # of the processors' time, that others may use while a cost is measured


Reading = tuple[float, float, float | None]  # seconds: passed, ours, and of whoever worked


def reading() -> Reading:
    """Of the clock, this process and its ended children, and the CPUs that it may use."""
    busy = None
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        text, cpus = Path("/proc/stat").read_text(), os.sched_getaffinity(0)
        found = {name: times for name, *times in map(str.split, text.splitlines())}
        # user nice system idle iowait irq softirq steal
        ticks = [found[f"cpu{i}"][k] for i in cpus for k in (0, 1, 2, 5, 6, 7)]
        busy = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), cpu_seconds(), busy


def share_of_others(before: Reading, now: Reading) -> float:
    """Of the CPUs' time between two readings; 0 where the system does not tell."""
    if before[2] is None or now[2] is None:
        return 0.0
    passed, own, busy = (b - a for a, b in zip(before, now, strict=True))
    return (busy - own) / len(os.sched_getaffinity(0)) / passed


class Children:
    """Processes that run one run after the other, with one thread each."""

    def __init__(self, question: str, folder: Path, jobs: int = 1) -> None:
        self.jobs, self._question, self._folder = jobs, question, folder
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context)

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, run: Run, counted: bool) -> Future[dict]:
        return self._pool.submit(_run, self._question, run, self._folder, counted)


def _run(question: str, run: Run, folder: Path, counted: bool) -> dict:
    torch.set_num_threads(1)
    return load(question).run(run, folder, counted)


def alone(question: str, folder: Path, run: Run) -> dict:
    """A run's record, with its process over and done with."""
    with Children(question, folder) as children:
        return children.start(run, counted=False).result()


def errors(part: Part, records: list[dict], children: Children, save: Callable[[], None]) -> int:
    """Add the records of all runs that are wanted; how many have failed, which it tells."""
    running: dict[Future[dict], Run] = {}
    begun: set[Run] = set()
    failed = 0
    while True:
        for run in part.wanted(records):
            if len(running) < children.jobs and run not in begun:
                begun.add(run)
                if not any(run.is_of(record) for record in records):
                    running[children.start(run, counted=True)] = run
        if not running:
            return failed
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            if error := future.exception():
                failed += 1
                print(f"{run}: {type(error).__name__}: {error}", flush=True)
                continue
            records.append({**asdict(run), **future.result()})
            save()
            print(records[-1], flush=True)


def costs(
    part: Part,
    records: Sequence[dict],
    found: list[dict],
    run_alone: Callable[[Run], dict],
    save: Callable[[], None],
) -> int:
    """Add the seconds of each method and budget; how many there is none of, which it tells."""
    missing = 0
    for count in range(ROUNDS):
        for run in part.once(records):
            if sum(map(run.is_of, found)) > count:
                continue
            start = reading()
            try:
                record = run_alone(run)
            except Exception as error:  # whatever a rival's package raises
                missing += 1
                print(f"{run}: {type(error).__name__}: {error}", flush=True)
                continue
            others = share_of_others(start, reading())
            if others > OTHERS:
                missing += 1
                print(f"thrown away, as others took {others:.0%}: {run}", flush=True)
                continue
            found.append({**asdict(run), **{k: record[k] for k in TIMES if k in record}})
            save()
    return missing
