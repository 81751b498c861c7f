"""Networks that several tests build, each defined once, in the order of their names."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

# One network of torchvision for each kind of block; the others differ in depth and width, or do not
# fit in here.
FAMILIES = [
    *("convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t"),
]


class Blocks(nn.Module):
    """Three blocks of convolution, norm and ReLU, dropout, and a head."""

    def __init__(self, dropout=0.2, width=12, stride=2):
        super().__init__()
        self.a, self.b = conv_block(3, 8), conv_block(8, width, stride)
        self.c = conv_block(width, 8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.dropout(self.c(self.b(self.a(x))).mean((2, 3))))


class Branching(nn.Module):
    """Control flow on values, which torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        y = self.b(self.a(x))
        return y if y.sum() > 0 else -y


def conv_block(inputs, outputs, stride=1):
    block = nn.Sequential()
    block.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    block.norm, block.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return block


class Does(nn.Module):
    """Parts, and a function of the module and its input."""

    def __init__(self, body, **parts):
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.body(self, x)


class Keywords(nn.Module):
    """Is called with keyword arguments alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.second(self.first(images) * scale)


class Many(nn.Module):
    """Several inputs, by position and by name, one of them no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x, y, *, scale=1.0, extra=None):
        z = self.a(x) + y * scale
        return self.b(z if extra is None else z + extra)


class Residual(nn.Module):
    """In-place sums, a parameter that is used by itself, dropout, a buffer."""

    def __init__(self, blocks=3, width=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(width, 1, 1), persistent=False)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(width, 4)

    def forward(self, x):
        y = F.relu(self.blocks(F.relu(self.stem(x))) * self.scale + self.shift)
        return self.head(self.dropout(y.mean((2, 3))))


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Skipping(nn.Module):
    """The head's weight is used at the bottom as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.head(self.b(self.a(x @ self.head.weight)))


def linears(*widths):
    """Linear layers between these widths, a layer each."""
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))


def small_model():
    """With statistics and dropout, of [N, 4] to [N, 3]."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def tied_model():
    """Two layers that share their only weight."""
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def tiny_bert(**options):
    """Hugging Face's BERT of three layers for classification, made from a config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def torchvision_model(name, size=None):
    """Without its weights, in training mode, and an input."""
    from torchvision.models import get_model

    size = size or {"inception_v3": 299, "maxvit_t": 224}.get(name, 32)
    options = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return get_model(name, weights=None, **options).train(), torch.randn(2, 3, size, size)
