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

# Pillow's names of the formats that are read: those that hold one picture in pixels.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def image_endings() -> tuple[str, ...]:
    """How the names of files in :data:`FORMATS` end, in small letters."""
    known = optional_package("PIL.Image").registered_extensions()
    return tuple(ending for ending, kind in known.items() if kind in FORMATS)


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
    """Images in memory: uint8 ``[N, C, H, W]``, labels int64 ``[N]``.

    Raises:
        ValueError: they are of another dtype or shape.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, value, dtype, shape in (
            ("labels", self.labels, torch.int64, "[N]"),
            ("pixels", self.pixels, torch.uint8, "[N, C, H, W]"),
        ):
            known = value.dtype == dtype and value.ndim == shape.count(",") + 1
            if not known or len(value) != len(self.labels):
                raise ValueError(
                    f"{name} must be {dtype} {shape}, N the same for both, "
                    f"got {value.dtype} {list(value.shape)}"
                )

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
        v2 = optional_package("torchvision.transforms.v2")
        return v2.Compose([v2.Resize(self.scaled), v2.CenterCrop(self.size)])(image)


@dataclass(frozen=True)
class RandomCrop:
    """Scales a random part to ``size`` pixels in square, and mirrors half of the images.

    The part has 8% to 100% of the area and sides of 3:4 to 4:3 (Szegedy et al., 2015, section 6),
    as in the Torch code that Snapshot Ensembles builds on.
    """

    size: int

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Any:
        v2 = optional_package("torchvision.transforms.v2")
        vary = v2.Compose([v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(mixed_seed(*seed))
            return vary(image)


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
        pillow = optional_package("PIL.Image")
        try:
            with pillow.open(path, formats=FORMATS) as image:
                pixels = in_rgb(image)
        except Exception as error:  # Pillow raises all kinds for a damaged file
            text = str(error) or type(error).__name__
            raise RecipeError(f"cannot read the image {path}: {text}") from error
        framed = self.framing(pixels, (*self.key, index))
        return torch.from_numpy(np.array(framed)).permute(2, 0, 1).contiguous()


def in_rgb(image: Any) -> Any:
    """What Pillow has opened, as it is to be seen: upright, 8 bits of red, green and blue.

    The first picture of several is taken. The camera's note of what is up (EXIF) is followed. Of 16
    bits, or of TIFF's 12, the higher 8 are taken, and floats are from 0, black, to 1, white. What
    is transparent shows white. Colour profiles are not applied.

    Raises:
        ValueError: it cannot be known which of its numbers are black and white.
    """
    pillow = optional_package("PIL.Image")
    tags = getattr(image, "tag_v2", {})  # of a TIFF, by number
    signed = 2 in tags.get(339, ())  # SampleFormat
    white_is_zero = tags.get(262) == 0  # PhotometricInterpretation
    has_12_bits = tags.get(258) == (12,)  # BitsPerSample
    deep = image.mode == "F" or image.mode.startswith("I")
    if signed or (image.mode == "I" and image.format != "PPM"):
        raise ValueError("integers must be unsigned and have 8 or 16 bits")
    if deep and white_is_zero:  # Pillow reads these as if zero were black
        raise ValueError("with more than 8 bits zero must be black (PhotometricInterpretation 1)")
    optional_package("PIL.ImageOps").exif_transpose(image, in_place=True)
    if deep:
        values = np.asarray(image)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):  # nor if one is NaN
                raise ValueError(f"floats must be in 0..1, got {values.min()}..{values.max()}")
            values = np.rint(255 * values)
        else:
            values = values >> (4 if has_12_bits else 8)
        return pillow.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = pillow.new("RGBA", image.size, "white")
        image = pillow.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
