"""A command in a process of its own, with a time limit, begun anew where it has died."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DIED = 3  # exit status of who cannot go on; 1 is that of who has come to the end, with failures


def context_is_broken() -> bool:
    """Whether an error on the device has made this process's CUDA context useless."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:  # of more than one type
        return True
    return False


def run_job(
    command: Sequence[str],
    seconds: float,
    log: Path,
    *,
    folder: Path = Path(),
    environment: Mapping[str, str] = {},
    tick: Callable[[], None] = lambda: None,
    done: Callable[[], int] = lambda: 0,
) -> dict:
    """Run a command in a folder, at most so long; its children end with it.

    Its output is added to ``log``, and ``tick`` is called about once a second. ``done`` counts what
    it has done: where it has died after doing something, it runs once more.

    Returns:
        "status" ("ok", "failed" or "cut off"), "seconds", and "exit_statuses" of what failed.
    """
    start, before, failed = time.monotonic(), -1, []
    code: int | None = DIED
    while code not in (0, 1, None) and done() > before:
        before = done()
        left = start + seconds - time.monotonic()
        code = _run(command, left, log, tick, cwd=folder, env={**os.environ, **environment})
        failed += [code] if code else []
        tick()
    status = "cut off" if code is None else "failed" if failed else "ok"
    found = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    return {**found, "exit_statuses": failed} if failed else found


def _run(
    command: Sequence[str], seconds: float, log: Path, tick: Callable[[], None], **options: Any
) -> int | None:
    """The exit status; None if it was cut off."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                return process.wait(min(1, max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                tick()
        return process.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):  # its children may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
