"""Every case by its name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.case import Case
from benchmarks.ensemble_cases import ensemble_cases
from benchmarks.kernel_cases import kernel_cases
from benchmarks.optimizer_cases import optimizer_cases
from benchmarks.step_cases import step_cases


def cases(device: str = "cpu", compiling: bool = False) -> dict[str, Callable[[], Case]]:
    """Those of a device; if ``compiling``, with rivals that torch.compile takes minutes for."""
    return {
        **optimizer_cases(device, compiling),
        **step_cases(device),
        **ensemble_cases(device, compiling),
        **kernel_cases(device),
    }
