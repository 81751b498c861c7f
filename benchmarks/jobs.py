"""Commands in processes of their own, several at a time, with a limit and one log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOG_SECONDS = 5


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: in the results and the log.
        command: the program and its arguments.
        environment: what differs from ours.
        folder: where it runs.
        again: asked with the exit status when the command has failed: whether to run it once more.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    again: Callable[[int], bool] = lambda status: False


class Running:
    """A job that has been started; its children end with it."""

    def __init__(self, job: Job, log: Path) -> None:
        self.job, self._log, self._start = job, log, time.monotonic()
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._process = self._started()
        self._logged_at = self._start
        self._failed: list[int] = []  # exit statuses

    def _started(self) -> subprocess.Popen:
        with Path(self._output.name).open("ab") as writing:
            return subprocess.Popen(
                self.job.command,
                cwd=self.job.folder,
                env={**os.environ, **self.job.environment},
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether it has; copies what it has written to the log, every few seconds."""
        status = self._process.poll()
        if status is not None or time.monotonic() > self._logged_at + LOG_SECONDS:
            self._log_output()
        if not status:
            return status is not None
        self._failed.append(status)
        again = self.job.again(status)
        if again:
            self.kill()
            self._process = self._started()
        return not again

    def _log_output(self) -> None:
        self._logged_at = time.monotonic()
        text = self._output.read().rstrip()
        if text:
            with self._log.open("ab") as log:
                log.write(f"--- {self.job.name}\n".encode() + text + b"\n")

    def result(self) -> dict:
        """Of one that has ended, or has to, now."""
        last = self._process.poll()
        self.kill()
        self._log_output()
        failed = self._failed or [status for status in [last] if status]
        status = "cut off" if last is None else "failed" if failed else "ok"
        found = {"status": status, "seconds": round(time.monotonic() - self._start, 1)}
        return {**found, "exit_statuses": failed} if failed else found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # its children may outlive it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def while_it_gets_on(done: Callable[[], int]) -> Callable[[int], bool]:
    """For :attr:`Job.again`: as long as each run has done something, as ``done`` counts."""
    before = 0

    def again(status: int) -> bool:
        nonlocal before
        now = done()
        more, before = now > before, now
        return more

    return again


def run_jobs(
    jobs: Sequence[Job],
    seconds: float,
    log: Path,
    tick: Callable[[], None] = lambda: None,
    at_once: int = 1,
) -> dict:
    """Run jobs in their order, at most so long; ``tick`` is called about once a second.

    Returns:
        The status of all ("ok", "failed", "cut off"), seconds, and each job's.
    """
    start = time.monotonic()
    waiting, running, results = list(jobs), [], {}
    try:
        while (waiting or running) and time.monotonic() < start + seconds:
            while waiting and len(running) < at_once:
                running.append(Running(waiting.pop(0), log))
            next_tick = time.monotonic() + 1
            while time.monotonic() < min(next_tick, start + seconds):
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    results[one.job.name] = one.result()
                if not running:
                    break
                time.sleep(0.05)
            tick()
    finally:
        for one in running:
            results[one.job.name] = one.result()
    results |= {job.name: {"status": "cut off", "seconds": 0.0} for job in waiting}
    tick()
    found = {result["status"] for result in results.values()}
    status = "cut off" if "cut off" in found else "failed" if "failed" in found else "ok"
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "jobs": {job.name: results[job.name] for job in jobs},
    }
