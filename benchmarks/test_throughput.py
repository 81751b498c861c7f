"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.optimizer_cases import PACKAGES


@lru_cache(maxsize=1)  # tests of one case follow each other
def made(case: str) -> Case:
    return CASES[case]()


def most_runs(case: str) -> int:
    return 5 + (len(PACKAGES) if case.endswith("momentum") else 0)


@pytest.mark.parametrize(
    ("case", "run"), [(case, run) for case in CASES for run in range(most_runs(case))]
)
def test_run(benchmark, case, run):
    torch.set_num_threads(1)
    runs = list(made(case).runs.items())
    if run >= len(runs):
        pytest.skip("this case has fewer rivals")
    benchmark.extra_info["rival"] = runs[run][0]
    benchmark(runs[run][1])
