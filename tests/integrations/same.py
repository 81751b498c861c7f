"""What trainings by a framework and by hand must agree in."""

import torch


def assert_same_bits(found, expected):
    """Two state dicts."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def assert_same_snapshots(found, expected):
    """What one store holds, to its last bit, and a part of the other."""
    assert [(s.step, s.cycle) for s in found] == [(s.step, s.cycle) for s in expected] != []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.sha256 == theirs.sha256
