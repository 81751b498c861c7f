"""What the optimizers' tests share: a network in layers, its training, and what is compared."""

from __future__ import annotations

import torch

from tests.conftest import EMULATED, HAS_GPU, kernel, kernels
from tests.nets import linears

# Without a GPU, Triton's plans differ from CUDA's in the launch alone, which other tests see.
BACKENDS = kernels() if HAS_GPU else [kernel("reference", "cpu"), kernel("cpu", "cpu"), EMULATED]


def net(seed=0):
    torch.manual_seed(seed)
    return linears(6, 9, 33, 5)


def layer_groups(model):
    layers = list(model)
    return [
        {"params": list(m.parameters()), "layer_index": i, "num_layers": len(layers)}
        for i, m in enumerate(layers)
    ]


def train(model, optimizer, steps, *, start=0):
    """So many steps, each on a batch of its own."""
    weight = next(model.parameters())
    for step in range(start, start + steps):
        generator = torch.Generator("cpu").manual_seed(step)
        batch = torch.randn(8, 6, generator=generator, device="cpu").to(weight.device, weight.dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_equal_training(ours, theirs, rtol=1e-6, atol=1e-7):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def counts(optimizer):
    """Adam's count of each parameter's steps; None where there is no state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["step"].item() if p in optimizer.state else None for p in params]
