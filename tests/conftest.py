"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

import fastfreeze

HAS_CPU_KERNELS = fastfreeze.backends()["cpu"].available
needs_cpu_kernels = pytest.mark.skipif(
    not HAS_CPU_KERNELS, reason=str(fastfreeze.backends()["cpu"])
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
def backend(request):
    """Every backend that a CPU can run."""
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """Each instruction set of the CPU kernels that this machine has."""
    if not HAS_CPU_KERNELS:
        pytest.skip(str(fastfreeze.backends()["cpu"]))
    level = ["baseline", "avx2", "avx512"].index(request.param)
    before = torch.ops.fastfreeze.cpu_isa(-1)
    try:
        torch.ops.fastfreeze.cpu_isa(level)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    torch.ops.fastfreeze.cpu_isa(before)
