"""Fixtures of the optimizers' tests: each backend, and its device as the default one."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import resolved
from tests.optim.helpers import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend_and_device(request):
    return resolved(request)


@pytest.fixture(autouse=True)
def _on_the_backends_device(request):
    """Whatever a test makes is where its backend wants it."""
    if "backend_and_device" not in request.fixturenames:
        yield
        return
    with torch.device(request.getfixturevalue("device")):
        yield
