"""Labelled images: in memory, or files that are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastfreeze.recipes.augmentation import mixed_seed
from fastfreeze.recipes.errors import RecipeError, optional_package


class Images(Protocol):
    """Labelled images, read by a list of indices."""

    @property
    def labels(self) -> Tensor:
        """int64 ``[N]``."""

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, C, H, W]`` and int64 ``[B]``."""

    def part(self, indices: Tensor) -> Images:
        """Those at ``indices``, int64 ``[n]``, alone."""

    def in_epoch(self, seed: int, epoch: int) -> Images:
        """The images as they are read in an epoch, where reading varies them."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: uint8 ``[N, C, H, W]``, labels int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]

    def part(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.pixels[indices], self.labels[indices])

    def in_epoch(self, seed: int, epoch: int) -> MemoryImages:
        return self


class Framing(Protocol):
    """How an image of any size becomes one of the size that a network is given."""

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Any:
        """A PIL image in RGB from another; ``seed`` decides what is random."""


@dataclass(frozen=True)
class Fit:
    """Scales and centre-crops to ``size`` pixels in square."""

    size: int

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Any:
        return optional_package("PIL.ImageOps").fit(image, (self.size, self.size))


@dataclass(frozen=True)
class CentreCrop:
    """Scales the shorter side to ``scaled`` pixels and takes the centre, ``size`` in square."""

    scaled: int
    size: int

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Any:
        functional = optional_package("torchvision").transforms.functional
        return functional.center_crop(functional.resize(image, self.scaled), self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Scales a random part to ``size`` pixels in square, and mirrors half of the images.

    The part has 8% to 100% of the area and sides of 3:4 to 4:3 (Szegedy et al., 2015, section 6),
    as in the Torch code that Snapshot Ensembles builds on.
    """

    size: int

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Any:
        transforms = optional_package("torchvision").transforms
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(mixed_seed(*seed))
            part = transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            mirrored = bool(torch.rand(()) < 0.5)
        image = transforms.functional.resized_crop(image, *part, [self.size, self.size])
        return transforms.functional.hflip(image) if mirrored else image


@dataclass(frozen=True)
class FileImages:
    """Image files below a directory, decoded when they are asked for.

    Attributes:
        root: the directory.
        names: paths below it as an array of bytes, which loader processes share: they would copy a
            list of a million strings, one by one, by counting references.
        labels: int64 ``[N]``.
        framing: brings an image to size.
        key: seed and epoch, which together with an image's index decide what is random in it.
    """

    root: str
    names: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: Tensor
    framing: Framing
    key: tuple[int, ...] = ()

    @classmethod
    def below(
        cls, root: Path, paths: Sequence[str | Path], labels: Sequence[int], framing: Framing
    ) -> FileImages:
        """The files at ``paths``, which start with ``root``."""
        prefix = f"{root}{os.sep}"
        names = np.array([os.fsencode(str(path).removeprefix(prefix)) for path in paths])
        return cls(str(root), names, torch.tensor(labels, dtype=torch.int64), framing)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._decode(i) for i in indices]), self.labels[indices]

    def part(self, indices: Tensor) -> FileImages:
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])

    def in_epoch(self, seed: int, epoch: int) -> FileImages:
        return replace(self, key=(seed, epoch))

    def _decode(self, index: int) -> Tensor:
        path = Path(self.root, os.fsdecode(bytes(self.names[index])))
        try:
            with optional_package("PIL.Image").open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises each for a damaged file
            raise RecipeError(f"cannot read the image {path}: {error}") from error
        framed = self.framing(pixels, (*self.key, index))
        return torch.from_numpy(np.array(framed)).permute(2, 0, 1).contiguous()
