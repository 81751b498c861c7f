"""How chains are computed, seen from outside."""

from __future__ import annotations

import pytest

from fastfreeze.cache import calls


@pytest.fixture
def runs(monkeypatch):
    """How chains are computed, as they come: from the inputs, or from kept values."""
    seen = []
    real = calls.Chain.compute

    def compute(self, *args, **options):
        seen.append("carried on" if options.get("given") else "inputs")
        return real(self, *args, **options)

    monkeypatch.setattr(calls.Chain, "compute", compute)
    return seen
