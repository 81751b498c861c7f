"""Parameters of the networks that are measured, without the networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastfreeze.recipes.models import build_model

TORCHVISION = ("resnet50", "vit_b_16")  # build_model's resnet50 is another


@dataclass(frozen=True)
class Shapes:
    """Parameters of a network, in so many groups of neighbours."""

    tensors: Sequence[Sequence[int]]
    num_groups: int = 1

    def groups(self, device: str, dtype: torch.dtype) -> list[dict]:
        """Parameters with gradients, the same for every call."""
        torch.manual_seed(0)
        params = []
        for shape in self.tensors:
            p = nn.Parameter(torch.randn(*shape, device=device, dtype=dtype))
            p.grad = torch.randn_like(p)
            params.append(p)
        n = self.num_groups
        ends = [round(i * len(params) / n) for i in range(n + 1)]
        return [
            {"params": params[a:b], "layer_index": i, "num_layers": n}
            for i, (a, b) in enumerate(itertools.pairwise(ends))
        ]


def shapes_of(model_name: str) -> list[Sequence[int]]:
    """Of a network's parameters, without making them."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in network(model_name).parameters()]


def network(model_name: str, **torchvision_options: int) -> nn.Module:
    """A network of :func:`build_model`, or one of torchvision's; options are for the latter."""
    if model_name not in TORCHVISION:
        return build_model(model_name)
    import torchvision

    return torchvision.models.get_model(model_name, weights=None, **torchvision_options)
