"""Peak memory of a stretch of work: the process's on a CPU, the allocator's on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch


def release(device: torch.device) -> None:
    """Give back what is no longer used, so that the next stretch starts low."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


class PeakMemory:
    """The highest use of memory since this object was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._known = _reset_high_water_mark()

    def mb(self) -> float | None:
        """In 10**6 bytes; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        return _status_kib("VmHWM") * 1024 / 1e6 if self._known else None


def _reset_high_water_mark() -> bool:
    """Bring Linux's VmHWM down to what is in use; False where that does not work."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_kib("VmHWM") <= 1.05 * _status_kib("VmRSS")
    except (OSError, LookupError):
        return False


def _status_kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise LookupError(field)
    return int(found.group(1))
