"""Readings of clocks: of work on a device, without making a GPU wait for the host, and of CPUs."""

from __future__ import annotations

import os
import time
from typing import Any

import torch


def cpu_seconds() -> float:
    """CPU seconds of this process, of all its threads, and of its children that have ended."""
    return sum(os.times()[:4])


class Clock:
    """The time at which work on a device is done: the host's, or events in the GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None

    def now(self) -> Any:
        """A reading, after all work that was queued so far."""
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two readings; waits until the device has come to the second."""
        if self._gpu is None:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end) / 1e3)
