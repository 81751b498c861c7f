"""Inputs and truths of the softmax tests."""

from __future__ import annotations

import math

import pytest
import torch

from fastfreeze.kernels.softmax_arguments import choose_backend
from tests.conftest import ISAS, kernels
from tests.covering import covering

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# [B, C]: a row to a lane up to 16 classes, groups of rows up to 2048, blocks above.
SHAPES = [(0, 10), (1, 2), (33, 2), (33, 10), (3, 16), (33, 17), (1, 31), (33, 32), (3, 33)]
SHAPES += [(33, 100), (3, 1000), (1, 2047), (3, 2048), (1, 2049), (3, 4097)]
# Weights of 4 members, and a temperature.
OPTIONS = {
    "plain": (None, 1.0),
    "weighted": ([3.0, 0.5, 0.25, 2.0], 1.0),
    "some weights 0": ([0.0, 1.0, 0.0, 3.0], 1.0),
    "cold": (None, 0.5),
    "hot and weighted": ([1, 2, 3, 4], 3.0),
}

# Relative, and absolute for what underflows. 16-bit results are rounded once: half a unit.
TOLERANCE = {
    torch.float64: (1e-14, 0.0),
    torch.float32: (4e-6, 2e-45),
    torch.float16: (2.0**-11 * 1.01, 2.0**-25 * 1.01),
    torch.bfloat16: (2.0**-8 * 1.01, 0.0),
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_SHAPE = {f"{b}x{c}": (b, c) for b, c in SHAPES}
# What both operators are compared with fp64 by.
every_kernel_case = covering("isa", isa=ISAS, dtype=DTYPES, shape=EVERY_SHAPE, option=OPTIONS)
every_backend_case = covering(
    "backend_and_device",
    backend_and_device=kernels(),
    dtype=DTYPES,
    shape={**EVERY_SHAPE, "2x3x7": (2, 3, 7)},
    option=OPTIONS,
)
# How many members of how many classes: one, as many as a group, one more, and many of each.
COUNTS = [(1, 40), (16, 40), (17, 40), (50, 10), (5, 2000)]
BAD = [NAN, INF, -INF]
EXTREME_ROWS = [
    [1e4, -1e4, 9999.0],
    [88.0, 89.0, 90.0],
    [-90.0, -89.0, -88.0],
    [3e38, 3e38, -3e38],
    [0.0, -0.0, 0.0],
    [-INF, -500.0, -INF],
    [0.0, -103.5, -120.0],
]


def make(shape, members, dtype, device="cpu"):
    return [
        torch.randn(shape, dtype=torch.float64).mul(4).to(dtype).to(device) for _ in range(members)
    ]


def skip_unless_taken(backend, members):
    """Triton takes no long rows."""
    try:
        choose_backend(backend, "members", members)
    except ValueError as error:
        pytest.skip(str(error))


def shares(members, weights):
    weights = [1.0] * len(members) if weights is None else weights
    return [w / sum(weights) for w in weights]


def truth(members, weights=None, temperature=1.0):
    return sum(
        w * (z.double() / temperature).softmax(-1)
        for w, z in zip(shares(members, weights), members, strict=True)
    )


def log_truth(members, weights=None, temperature=1.0):
    logs = [
        (z.double() / temperature).log_softmax(-1) + (math.log(w) if w else -INF)
        for w, z in zip(shares(members, weights), members, strict=True)
    ]
    return torch.stack(logs).logsumexp(0)


def assert_probabilities_near(ours, expected):
    relative, absolute = TOLERANCE[ours.dtype]
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    error = (ours.double() - expected).abs() - absolute
    assert (error <= relative * expected).all(), (error / expected).max()


def assert_near(ours, members, weights=None, temperature=1.0):
    assert_probabilities_near(ours, truth(members, weights, temperature))


def assert_logs_near(ours, expected):
    """Of numbers from 0 to -inf, those near 0 to a share of 1."""
    relative = TOLERANCE[ours.dtype][0]
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    assert torch.equal(ours == -INF, expected == -INF)
    finite = expected != -INF
    error = (ours.double() - expected).abs()[finite]
    assert (error <= relative * (1 + expected[finite].abs())).all(), error.max()
