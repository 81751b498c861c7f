"""The networks of the two papers, for small images of any size.

ResNet (He et al., 2016, section 4.2), Wide ResNet (Zagoruyko and Komodakis, 2016), DenseNet and
DenseNet-BC (Huang et al., 2017), VGG-16 with batch normalisation (Simonyan and Zisserman, 2015).
Every model is a chain ``stem, blocks, head``, whose links :func:`fastfreeze.split` takes as
layers, and ends in a global average, so that the image size is free. Convolutions start from
He's normal distribution over the outputs, as in the papers.

Snapshot Ensembles (section 4.2) trains "resnet110", a Wide ResNet of 32 layers, which is a ResNet
with four times the channels ("resnet32-w64"), "densenet40" and "densenet100-24"; on Tiny ImageNet
with ``stem_stride=2``. FreezeOut trains "densenet-bc-76", "wrn40-4" and "vgg16-fc". Where that
differs from the authors' code:

* DenseNet without bottlenecks starts with 16 channels, as its paper says; its public Lua code takes
  ``2 * growth`` there, as for DenseNet-BC.
* No dropout in DenseNet. Its paper drops 20% where images are not augmented, on SVHN for instance;
  in Snapshot Ensembles that is a baseline of its own.
* FreezeOut's DenseNet-BC has ReLU before the norm in transitions; ours has the norm first, as in
  the DenseNet paper. The parameters are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfreeze.checks import check_int
from fastfreeze.recipes.names import MODEL_NAMES


def build_model(
    name: str, *, num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> nn.Module:
    """A network by its name, with freshly drawn weights.

    Args:
        name: such as "resnet20", "resnet110", "resnet20-w32" (32 channels in the first stage),
            "tiny-resnet20" (a stem of stride 2: a quarter of the work), "wrn16-2", "wrn40-4",
            "densenet40" (growth 12), "densenet-bc-76", "densenet-bc-100-24", "vgg16", "vgg16-fc"
            (the head of FreezeOut's code: three linear layers).
        num_classes, in_channels: outputs, and channels of the images; >= 1.
        stem_stride: multiplies the stride of the first convolution, >= 1. Snapshot Ensembles
            takes 2 for the 64 pixels of Tiny ImageNet.

    Returns:
        A module from images ``[B, in_channels, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ValueError: no network has that name, its depth does not exist, or a count is below 1.
    """
    sizes = _Sizes(num_classes, in_channels, stem_stride)
    for key, count in vars(sizes).items():
        check_int(key, count, minimum=1)
    for pattern, build in _BUILDERS:
        match = re.fullmatch(pattern, name)
        if match:
            return build(sizes, *(int(group) for group in match.groups() if group))
    raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}; got {name!r}")


class Network(nn.Module):
    """A stem, blocks in a chain, and a head on the average over the image."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        return cast(Tensor, self.head(self.blocks(self.stem(images))))


@dataclass(frozen=True)
class _Sizes:
    num_classes: int
    in_channels: int
    stem_stride: int


def resnet(sizes: _Sizes, depth: int, width: int = 16, *, tiny: bool = False) -> Network:
    """ResNet of ``6n + 2`` layers in three stages of ``width``, ``2 * width``, ``4 * width``.

    ``tiny`` doubles the stem's stride. Shortcuts hold no parameters (option A of the paper): where
    the shape changes they skip every second pixel and pad the new channels with zeros.
    """
    per_stage = _blocks_per_stage("resnet", depth, layers_per_block=2, rest=2)
    stem = _conv(sizes.in_channels, width, 3, sizes.stem_stride * (2 if tiny else 1))
    return Network(
        _Chain(stem, nn.BatchNorm2d(width), nn.ReLU()),
        _stages(_ResidualBlock, width, width, per_stage),
        _head(4 * width, sizes.num_classes, norm=False),
    )


def wide_resnet(sizes: _Sizes, depth: int, widening: int) -> Network:
    """Wide ResNet of ``6n + 4`` layers, pre-activated, stages of 16, 32, 64 times ``widening``."""
    per_stage = _blocks_per_stage("wrn", depth, layers_per_block=2, rest=4)
    blocks = _stages(_PreActivationBlock, 16, 16 * widening, per_stage)
    stem = _conv(sizes.in_channels, 16, 3, sizes.stem_stride)
    return Network(stem, blocks, _head(64 * widening, sizes.num_classes))


def _stages(
    block: Callable[[int, int, int], nn.Module], channels: int, width: int, per_stage: int
) -> list[nn.Module]:
    """Three stages of blocks, each of twice the width and half the size of the one before."""
    blocks = []
    for stage in range(3):
        for position in range(per_stage):
            stride = 2 if stage > 0 and position == 0 else 1
            blocks.append(block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return blocks


def densenet(sizes: _Sizes, depth: int, growth: int = 12, *, bottleneck: bool = False) -> Network:
    """DenseNet of three dense blocks; with ``bottleneck`` DenseNet-BC (reduction 0.5).

    The stem has 16 channels, or ``2 * growth`` in DenseNet-BC.
    """
    name = "densenet-bc" if bottleneck else "densenet"
    per_stage = _blocks_per_stage(name, depth, layers_per_block=2 if bottleneck else 1, rest=4)
    channels = 2 * growth if bottleneck else 16
    stem = _conv(sizes.in_channels, channels, 3, sizes.stem_stride)
    blocks: list[nn.Module] = []
    for stage in range(3):
        if stage > 0:
            reduced = channels // 2 if bottleneck else channels
            norm, narrowed = nn.BatchNorm2d(channels), _conv(channels, reduced, 1)
            blocks.append(_Chain(norm, nn.ReLU(), narrowed, nn.AvgPool2d(2)))
            channels = reduced
        for _ in range(per_stage):
            blocks.append(_DenseLayer(channels, growth, bottleneck))
            channels += growth
    return Network(stem, blocks, _head(channels, sizes.num_classes))


def vgg16(sizes: _Sizes, *, fc: bool = False) -> Network:
    """VGG-16 with batch normalisation and one linear layer on the last 512 channels.

    With ``fc``, the head is that of FreezeOut's code: three linear layers with norms and dropout.
    """
    convolutions = _vgg16_convolutions(sizes.in_channels, sizes.stem_stride)
    if not fc:
        head = _Chain(_halved(), _head(512, sizes.num_classes, norm=False))
        return Network(convolutions[0], convolutions[1:], head)
    pool = [_halved(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    first = [nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout()]
    second = [nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.BatchNorm1d(512)]
    head = _Chain(*pool, *first, *second, nn.Dropout(), nn.Linear(512, sizes.num_classes))
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
    return Network(convolutions[0], convolutions[1:], head)


def _vgg16_convolutions(in_channels: int, stem_stride: int) -> list[nn.Module]:
    """Thirteen, each with its norm and activation; the fifth pooling is the head's."""
    convolutions: list[nn.Module] = []
    channels, stride = in_channels, stem_stride
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        for position in range(2 if stage < 2 else 3):
            layers = [_conv(channels, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()]
            pooled = [_halved()] if stage > 0 and position == 0 else []
            convolutions.append(_Chain(*pooled, *layers))
            channels, stride = width, 1
    return convolutions


class _Chain(nn.Module):
    """Layers in a row that freeze together: split() would open a plain ``nn.Sequential``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class _ResidualBlock(nn.Module):
    """Two convolutions, and the input added before the last activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride > 1 or self.new_channels > 0:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + x)


class _PreActivationBlock(nn.Module):
    """Norm and activation before each convolution; a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else _conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.norm2(self.conv1(out)))
        return cast(Tensor, self.conv2(out) + shortcut)


class _DenseLayer(nn.Module):
    """``growth`` new channels behind all that came before."""

    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            layers += [nn.BatchNorm2d(in_channels), nn.ReLU(), _conv(in_channels, 4 * growth, 1)]
            in_channels = 4 * growth
        layers += [nn.BatchNorm2d(in_channels), nn.ReLU(), _conv(in_channels, growth, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def _halved() -> nn.Module:
    return nn.MaxPool2d(2, ceil_mode=True)  # else images of 28 pixels would vanish at the fifth


def _head(channels: int, num_classes: int, norm: bool = True) -> nn.Module:
    """Average over the image and a linear layer; ``norm``: behind a norm and an activation."""
    layers: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU()] if norm else []
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return _Chain(*layers, *pool)


def _conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)


def _blocks_per_stage(name: str, depth: int, layers_per_block: int, rest: int) -> int:
    """Blocks in each of three stages; ``rest`` layers lie outside them."""
    blocks, left = divmod(depth - rest, 3 * layers_per_block)
    if blocks < 1 or left:
        raise ValueError(
            f"depth of {name} must be {3 * layers_per_block} * n + {rest}, n >= 1, got {depth}"
        )
    return blocks


_BUILDERS: tuple[tuple[str, Callable[..., nn.Module]], ...] = (
    (r"resnet-?([1-9]\d*)(?:-w([1-9]\d*))?", resnet),
    (r"tiny-resnet-?([1-9]\d*)", partial(resnet, tiny=True)),
    (r"wrn-?([1-9]\d*)-([1-9]\d*)", wide_resnet),
    (r"densenet-?([1-9]\d*)(?:-([1-9]\d*))?", densenet),
    (r"densenet-bc-?([1-9]\d*)(?:-([1-9]\d*))?", partial(densenet, bottleneck=True)),
    (r"vgg16", vgg16),
    (r"vgg16-fc", partial(vgg16, fc=True)),
)
