"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_fastfreeze(benchmark, case):
    torch.set_num_threads(1)
    benchmark(next(iter(CASES[case]().runs.values())))


@pytest.mark.parametrize("rival", range(1, 4))
@pytest.mark.parametrize("case", CASES)
def test_rival(benchmark, case, rival):
    torch.set_num_threads(1)
    runs = list(CASES[case]().runs.items())
    if rival >= len(runs):
        pytest.skip("this case has fewer rivals")
    benchmark.extra_info["rival"] = runs[rival][0]
    benchmark(runs[rival][1])
