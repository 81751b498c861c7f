"""Random variations of a batch of images, from a generator that the epoch decides."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ImageNet's pixels in 0..1: the deviation along each principal component, and the components as
# columns of red, green and blue; as in the Torch code that Snapshot Ensembles builds on.
_RGB_DEVIATIONS = torch.tensor([0.2175, 0.0188, 0.0045])
_RGB_COMPONENTS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def mixed_seed(*numbers: int) -> int:
    """A seed for torch's generators: a pure function of numbers >= 0, well apart for any two."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch: a pure function of both numbers."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch))


def augment(pixels: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to ``pad`` pixels, black moving in, and mirrors it half the time.

    Args:
        pixels: ``[B, C, H, W]``, any dtype.
        pad: largest shift; 0 for none. The same as padding by ``pad`` and cropping at random.
        flip: whether images are mirrored left to right.
        generator: where the randomness comes from.

    Returns:
        A tensor of the same shape and dtype.
    """
    if not pad and not flip:
        return pixels
    B, _, H, W = pixels.shape
    columns = torch.arange(W).expand(B, W)
    rows = torch.arange(H).expand(B, H)
    if flip:
        mirrored = torch.rand(B, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if pad:
        pixels = F.pad(pixels, (pad, pad, pad, pad))
        shifts = torch.randint(2 * pad + 1, (2, B, 1), generator=generator)
        rows, columns = rows + shifts[0], columns + shifts[1]
    images = torch.arange(B)[:, None, None]
    picked = pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def lighting(count: int, strength: float, generator: torch.Generator) -> Tensor:
    """What to add to the colours of ``count`` images, ``[count, 3, 1, 1]``, for pixels in 0..1.

    A random step along each principal component of RGB (Krizhevsky et al., 2012, section 4.1), its
    length normal, ``strength`` times the component's deviation.
    """
    steps = strength * torch.randn(count, 3, generator=generator) * _RGB_DEVIATIONS
    return (steps @ _RGB_COMPONENTS.T)[:, :, None, None]
