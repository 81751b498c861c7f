"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.case import Case
from benchmarks.cases import cases

MOST_RUNS = 6


@lru_cache(maxsize=1)  # tests of one case follow each other
def made(case: str) -> Case:
    return cases()[case]()


@pytest.mark.parametrize("run", range(MOST_RUNS))
@pytest.mark.parametrize("case", cases())
def test_run(benchmark, case, run):
    torch.set_num_threads(1)
    runs = list(made(case).runs.items())
    if run >= len(runs):
        pytest.skip("this case has fewer rivals")
    benchmark.extra_info["rival"] = runs[run][0]
    benchmark(runs[run][1])
