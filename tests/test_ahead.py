"""The next batch's frozen prefix, run ahead: on the CPU in turn, on a GPU beside the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.graph import trim
from fastfreeze.graph.prefix import Prefix
from tests.conftest import every_device


def network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)
    )
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    return model.train()


def batches(count=6, device="cpu"):
    pairs = [(torch.randn(4, 3, 9, 9), torch.randn(4, 2, 3, 3)) for _ in range(count)]
    return [(x.to(device), y.to(device)) for x, y in pairs]


def train(model, trimmed, data, between=lambda i: None):
    """Losses; ``between`` is called after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for i, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = (trimmed(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        between(i)
    return losses


@pytest.fixture
def runs(monkeypatch):
    """The inputs that prefixes have run on, one by one."""
    seen = []
    original = Prefix.run

    def run(self, tensors):
        seen.append(tensors[0])
        return original(self, tensors)

    monkeypatch.setattr(Prefix, "run", run)
    return seen


def disturbances(model):
    def freeze_more(i):
        if i == 2:
            model[3].requires_grad_(False)

    def thaw(i):
        if i == 2:
            model[1].requires_grad_(True)

    def overwrite(i):
        if i == 2:
            with torch.no_grad():
                model[0].weight.mul_(1.5)

    return {"nothing": lambda i: None, "freeze": freeze_more, "thaw": thaw, "write": overwrite}


@every_device
@pytest.mark.parametrize("what", ["nothing", "freeze", "thaw", "write"])
def test_losses_are_the_same_to_the_bit(what, device, runs):
    model, data = network().to(device), batches(device=device)
    other = copy.deepcopy(model)
    expected = train(other, trim(other), data, disturbances(other)[what])
    runs.clear()
    trimmed = trim(model)
    assert train(model, trimmed, trimmed.ahead(data), disturbances(model)[what]) == expected
    if what == "nothing":  # each once, in order
        assert len(runs) == len(data)
        assert all(a is x for a, (x, _) in zip(runs, data, strict=True))


def test_it_has_run_before_it_is_asked_for(runs):
    model, data = network(), batches(3)
    trimmed = trim(model)
    counts = []
    for x, _ in trimmed.ahead(data):
        trimmed(x).sum().backward()
        counts.append(len(runs))
    assert counts == [2, 3, 3]


def test_inputs_are_chosen(runs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
            self.early.requires_grad_(False)

        def forward(self, x, *, scale):
            return self.late(self.early(x * scale))

    model = Two()
    trimmed = trim(model)
    data = [{"image": torch.randn(2, 3, 9, 9), "scale": torch.rand(1)} for _ in range(3)]
    inputs = lambda b: {"x": b["image"], "scale": b["scale"]}  # noqa: E731
    for batch in trimmed.ahead(iter(data), inputs):
        assert torch.equal(trimmed(**inputs(batch)), trim(model)(**inputs(batch)))
    assert list(trimmed.ahead([])) == []


def test_other_tensors_than_announced_are_told():
    model, data = network(), batches(3)
    trimmed = trim(model)
    expected = [trim(model)(x) for x, _ in data]

    def run():
        return [trimmed(x.clone()) for x, _ in trimmed.ahead(data)]

    with pytest.warns(FastfreezeWarning, match="not called with the tensors that were announced"):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_device
def test_a_batch_written_to_in_between(device):
    model, data = network().to(device), batches(3, device)
    trimmed = trim(model)
    for i, (x, _) in enumerate(trimmed.ahead(data)):
        assert torch.equal(trimmed(x), trim(model)(x))
        if i == 0:
            data[1][0].mul_(2)


def test_autocast_that_begins_in_between():
    model, data = network(), batches(3)

    def outputs(batches, network):
        found = []
        for i, (x, _) in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=i > 0):
                found.append(network(x))
        return found

    expected = outputs(data, trim(model))
    trimmed = trim(model)
    found = outputs(trimmed.ahead(data), trimmed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stopped_in_the_middle():
    model, data = network(), batches(3)
    trimmed = trim(model)
    for x, _ in trimmed.ahead(data):
        trimmed(x)
        break
    assert torch.equal(trimmed(data[1][0]), trim(model)(data[1][0]))
    copy.deepcopy(trimmed)


def test_bad_inputs():
    trimmed = trim(network())
    with pytest.raises(TypeError, match="inputs must be a tensor, a tuple of"):
        list(trimmed.ahead(batches(2), list))
