"""Members that tests of ensembles make, and what their ensemble must give."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def randomized(model):
    """With weights and statistics of its own."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) - 0.4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.add_(0.5)
    return model


def chain(make, shared, count):
    """State dicts of ``count`` members that have the entries named so in common."""
    first = randomized(make()).state_dict()
    found = [first]
    for _ in range(count - 1):
        own = copy.deepcopy(randomized(make()).state_dict())
        found.append({n: first[n].clone() if n.startswith(shared) else own[n] for n in first})
    return found


class Convolutions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("aten::convolution", "fastfreeze::winograd_conv2d")
        return function(*args, **(kwargs or {}))


def mean_of(members, *args, **kwargs):
    """The truth: each member by itself, in eval mode, the mean in float64."""
    with torch.no_grad():
        found = [m.eval()(*args, **kwargs).double().softmax(-1) for m in members]
    return torch.stack(found).mean(0)


def assert_mean(found, members, *args, atol=1e-6, **kwargs):
    expected = mean_of(members, *args, **kwargs)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def assert_right(ensemble, *args, atol=1e-6, **kwargs):
    assert_mean(ensemble(*args, **kwargs), ensemble.members, *args, atol=atol, **kwargs)
    each = list(ensemble.member_probabilities(*args, **kwargs))
    for found, member in zip(each, ensemble.members, strict=True):
        assert_mean(found, [member], *args, atol=atol, **kwargs)
