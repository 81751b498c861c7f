"""Networks that several tests build, each defined once, in the order of their names."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def linears(*widths):
    """Linear layers between these widths, a layer each."""
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))
