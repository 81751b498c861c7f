"""Compiled from outside, a trimmed model follows its flags as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fastfreeze import FeatureCache, trim
from tests.nets import Blocks

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


def in_place(network, **options):
    network.compile(**options)
    return network


def cached(network, **options):
    cache = FeatureCache(network, enabled=True)
    return torch.compile(lambda x: cache(x, samples=torch.arange(4)), **options)


WAYS = {
    "network": torch.compile,
    "what calls it": lambda network, **options: torch.compile(lambda x: network(x) + 0, **options),
    "in place": in_place,
    "a cache": cached,
}


def steps(wrap):
    """Outputs, gradients and buffers of steps with more and with fewer layers frozen."""
    torch.manual_seed(0)
    model, found = Blocks(dropout=1e-9), []
    network = wrap(trim(model, fold=False))
    x = torch.randn(4, 3, 8, 8)
    for num_frozen in (0, 0, 2, 2, 0, 3):
        for i, part in enumerate((model.a, model.b, model.c)):
            part.requires_grad_(i >= num_frozen)
        model.zero_grad()
        output = network(x)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"output": output.detach(), **gradients})
        found.append({n: b.clone() for n, b in model.named_buffers()})
        assert all(m.training for m in model.modules())
        assert not any("forward" in vars(m) for m in model.modules())
    return found


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_follows_the_flags(way):
    torch._dynamo.reset()
    counters.clear()
    found = steps(lambda network: way(network, backend="aot_eager"))
    assert counters["stats"]["unique_graphs"] >= 3
    torch.testing.assert_close(found, steps(lambda network: network), rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """Tells apart what is a plain tensor."""

    def forward(self, x):
        return x if type(x) is torch.Tensor else 2 * x


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_is_compiled_inside_gets_plain_tensors(wrapped):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Plain(), nn.Conv2d(6, 2, 3))
    model[:2].requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    expected = model.eval()(x)
    if wrapped:
        model[2] = torch.compile(model[2], backend="eager")
    else:
        model[2].compile(backend="eager")
    network = trim(model.train())
    for _ in range(2):
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)


def test_as_one_graph_it_is_refused():
    network = torch.compile(trim(Blocks()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fullgraph=True is not for it"):
        network(torch.randn(2, 3, 10, 10))
    network.eval()
    assert network(torch.randn(2, 3, 10, 10)).shape == (2, 5)
