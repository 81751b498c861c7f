"""Every case by its name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.case import Case
from benchmarks.host_cases import HOST_CASES
from benchmarks.kernel_cases import KERNEL_CASES
from benchmarks.optimizer_cases import COMPILED_CASES, OPTIMIZER_CASES
from benchmarks.step_cases import STEP_CASES

CASES: dict[str, Callable[[], Case]] = {
    **OPTIMIZER_CASES,
    **HOST_CASES,
    **STEP_CASES,
    **KERNEL_CASES,
}
ALL_CASES = {**CASES, **COMPILED_CASES}  # with those that take minutes
