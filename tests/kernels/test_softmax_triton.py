"""What is the Triton softmax kernel's own: sizes of its tiles, guarded results.

Without a GPU they run in Triton's interpreter, as in test_softmax.py.
"""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax import EnsembleStatistics
from tests.conftest import HAS_GPU, kernel
from tests.covering import covering
from tests.kernels.guard import SIDES, guarded
from tests.kernels.softmax_cases import (
    DEVICE,
    DTYPES,
    NAN,
    assert_near,
    assert_right,
    assert_statistics_near,
    labels_of,
    make,
    true_statistics,
    truth,
)

pytestmark = kernel("triton", DEVICE).marks
SHAPES = [(1, 1), (2, 1, 17), (2, 80), (33, 2), (17, 64), (2, 2048), (2, 2049), (2, 4096)]


@pytest.fixture
def kernels():
    from fastfreeze.kernels import softmax_triton

    return softmax_triton


@covering(shape=SHAPES, dtype=[torch.float32, torch.bfloat16])
def test_tiles_of_its_own_against_fp64(kernels, shape, dtype):
    assert_right(kernels, make(shape, 3, dtype, DEVICE))


def test_weights_of_fp64_lose_nothing(kernels):
    weights = [0.1, 1 / 3, 1.0, 0.0, 1e-9 / 7]
    parts = kernels._parts(weights)
    assert [sum(parts[3 * i : 3 * i + 3]) for i in range(5)] == weights
    assert torch.tensor(parts).tolist() == list(parts)


@pytest.mark.skipif(not HAS_GPU, reason="4 GiB of logits")
def test_more_than_2_31_elements(kernels):
    logits = torch.zeros(2**21 + 1, 1024, dtype=torch.float16, device=DEVICE)
    logits[-3:] = torch.randn(3, 1024)
    mean = kernels.ensemble_softmax([logits], None, 1.0, False)
    assert_near(mean[-3:], truth([logits[-3:]]))


@pytest.mark.skipif(HAS_GPU, reason="guards memory of the CPU")
@covering(classes=[10, 33], dtype=DTYPES, side=SIDES)
def test_nothing_beyond_the_ends_of_results_is_written(kernels, classes, dtype, side):
    members = [guarded(z, side) for z in make((2, classes), 3, dtype)]
    labels = guarded(labels_of(members), side)

    def poisoned(shape, dtype):
        return guarded(torch.full(shape, NAN).to(dtype), side)

    sums = sum_dtype(dtype)
    of_rows = [poisoned((2,), of) for of in (sums, torch.int64, sums, sums, sums)]
    mean = poisoned((2, classes), dtype)
    kernels.launch(members, None, 1.0, mean, labels=labels, summary=tuple(of_rows))
    ours = EnsembleStatistics(mean, *of_rows)
    assert_statistics_near(ours, true_statistics(members, labels), dtype)
