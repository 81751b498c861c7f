"""Parameters of the networks that are measured, without the networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from fastfreeze.recipes.models import build_model

TORCHVISION = ("resnet50", "vit_b_16")  # build_model's resnet50 is another
TINY = "tiny"  # with which it is seen at once whether anything works
TENSORS = [(2049,), (64, 3, 7, 7), (1,), (33, 5), (512, 512)]


def shapes_of(model_name: str) -> list[Sequence[int]]:
    """Of the parameters of a network of :func:`build_model` or torchvision, without making them."""
    if model_name == TINY:
        return [*TENSORS]
    with torch.device("meta"):
        if model_name in TORCHVISION:
            import torchvision

            model = torchvision.models.get_model(model_name, weights=None)
        else:
            model = build_model(model_name)
    return [tuple(p.shape) for p in model.parameters()]


def parameter_groups(
    shapes: Sequence[Sequence[int]],
    num_groups: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """So many groups of neighbours, with gradients, the same for every call."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(*shape, device=device, dtype=dtype))
        p.grad = torch.randn_like(p)
        params.append(p)
    ends = [round(i * len(params) / num_groups) for i in range(num_groups + 1)]
    return [
        {"params": params[a:b], "layer_index": i, "num_layers": num_groups}
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
