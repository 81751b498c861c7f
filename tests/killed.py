"""A process that is killed in the midst of its work, and what its run must then agree in."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import contextmanager

import torch

# The fields of a run's lines that no two runs share.
TIMINGS = {"seconds", "cpu_seconds", "step_seconds"}


def untimed(lines):
    """A run's results or metrics without times and memory."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


@contextmanager
def alive(run, *arguments):
    """Another process, which runs a function and has called ``ready``; it is killed in the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            run(*arguments, lambda: os.write(writing, b"r"))
        finally:
            os._exit(1)
    os.close(writing)  # so that the child's end is noticed
    try:
        assert select.select([reading], [], [], 60)[0], "not ready"
        assert os.read(reading, 1) == b"r", "ended before it was ready"
        yield
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL, "ended before it was killed"


def killed(run, *arguments, after=0.0):
    """Such a process is killed ``after`` seconds."""
    with alive(run, *arguments):
        time.sleep(after)
