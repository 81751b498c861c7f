"""Networks whose frozen parts are cached, and the check that the cache changes no bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastfreeze import FeatureCache, trim
from tests.nets import Blocks, Does, conv_block

on = partial(FeatureCache, enabled=True)


def frozen(model, *names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def network(*names, seed=0, device="cpu", **options):
    """A trimmed net in training mode with frozen parts, its statistics not those of a new one."""
    torch.manual_seed(seed)
    model = Blocks()
    with torch.no_grad():
        model(torch.randn(50, 3, 8, 8) * 2 + 1)
    return trim(frozen(model, *names).to(device), **options)


def own_network(body, *names, **parts):
    """A trimmed net of the parts of Blocks, and others, with a forward of its own."""
    usual = {"a": conv_block(3, 8), "b": conv_block(8, 12, 2), "c": conv_block(12, 8)}
    return trim(frozen(Does(body, **usual | {"head": nn.Linear(8, 5)} | parts), *names))


def images(n=24, seed=0, device="cpu"):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def both(cache, x, samples, *args):
    """The cache's output, and that of the network alone, with the same random numbers."""
    with torch.random.fork_rng():
        found = cache(x, *args, samples=samples)
    return found, cache.network(x, *args)


def check(cache, x, samples, *args):
    found, expected = both(cache, x, samples, *args)
    assert found.equal(expected)


def epochs(cache, x, num_epochs=2, batch=6, seed=0):
    """Check the batches of shuffled epochs."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x), generator=g).split(batch):
            check(cache, x[rows], rows)
