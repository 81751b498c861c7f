"""CPU time of a stretch of work: this process's, and what others took of the same CPUs."""

from __future__ import annotations

import os
from pathlib import Path

from fastfreeze.clock import cpu_seconds


class CpuTime:
    """CPU time since this object was made."""

    def __init__(self) -> None:
        self._own, self._busy = cpu_seconds(), _busy_seconds()

    def own(self) -> float:
        """Seconds of this process, over all threads, and of the children that have ended."""
        return cpu_seconds() - self._own

    def others(self) -> float | None:
        """Seconds of everything else, a mean over the CPUs that this process may use.

        It is precise to hundredths of a second, and so may be a bit below 0. None where the system
        does not tell.
        """
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        return (busy - self._busy - self.own()) / len(os.sched_getaffinity(0))


def _busy_seconds() -> float | None:
    """How long the CPUs which this process may use have worked since the system was started."""
    try:
        text, cpus = Path("/proc/stat").read_text(), os.sched_getaffinity(0)
    except (OSError, AttributeError):  # not Linux
        return None
    ticks = 0
    for line in text.splitlines():
        name, *times = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, times[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
