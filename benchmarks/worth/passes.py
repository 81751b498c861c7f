"""The two passes over the runs that are missing: errors, several at once, and costs, alone."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.worth.question import Part, Run, load
from benchmarks.worth.training import cpu_seconds

ROUNDS = 3
TIMES = ("seconds", "predict_ms")  # what a record may tell that an idle machine is for
OTHERS = 0.05  # of the processors' time, that others may use while a cost is measured


class Start(Protocol):
    """Starts runs: so many at once, each with its MACs counted or not."""

    jobs: int

    def start(self, run: Run, counted: bool) -> Future[dict]: ...


class Children:
    """Starts each run in a process of its own, with one thread."""

    def __init__(self, question: str, folder: Path, jobs: int = 1) -> None:
        self.jobs, self._question, self._folder = jobs, question, folder
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, max_tasks_per_child=1)

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, run: Run, counted: bool) -> Future[dict]:
        return self._pool.submit(_run, self._question, run, self._folder, counted)


def _run(question: str, run: Run, folder: Path, counted: bool) -> dict:
    torch.set_num_threads(1)
    record = load(question).run(run, folder, counted)
    return {**record, "process_seconds": cpu_seconds()}


def errors(part: Part, records: list[dict], children: Start, save: Callable[[], None]) -> int:
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


class Usage:
    """How busy all processors, and this process, have been up to now, in seconds."""

    def __init__(self) -> None:
        numbers = Path("/proc/stat").read_text().split()[1:9]
        user, nice, system, _idle, _waiting, *more = map(int, numbers)
        self.all = (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")
        self.at, self.own = time.monotonic(), time.process_time()


def others_share(before: Usage, after: Usage, child: float) -> float:
    """The share of all processors' time that was neither ours nor the child's."""
    there = (os.cpu_count() or 1) * (after.at - before.at)
    return ((after.all - before.all) - (after.own - before.own) - child) / there


def costs(
    part: Part,
    records: list[dict],
    found: list[dict],
    children: Start,
    save: Callable[[], None],
    usage: Callable[[], Usage] = Usage,
) -> int:
    """Add the seconds of each method and budget; how many were thrown away, which it tells."""
    thrown = 0
    for count in range(ROUNDS):
        for task in part.tasks:
            runs = [run for m in part.methods for run in part.chosen(records, task, m, seed=0)]
            for run in runs:
                if sum(map(run.is_of, found)) > count:
                    continue
                before = usage()
                try:
                    record = children.start(run, counted=False).result()
                except Exception as error:  # whatever a rival's package raises
                    thrown += 1
                    print(f"{run}: {type(error).__name__}: {error}", flush=True)
                    continue
                others = others_share(before, usage(), record["process_seconds"])
                if others > OTHERS:
                    thrown += 1
                    print(f"thrown away, as others took {others:.0%}: {run}", flush=True)
                    continue
                times = {key: record[key] for key in TIMES if key in record}
                found.append({**asdict(run), **times})
                save()
    return thrown
