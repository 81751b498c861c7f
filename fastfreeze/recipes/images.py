"""Labelled images: in memory, or files that are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfreeze.recipes.errors import optional_package, told
from fastfreeze.text import some

# Pillow's names of the formats that are read: those that hold one picture in pixels.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Operating systems put these beside a user's files, and names that begin with a dot.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: uint8 ``[N, C, H, W]``, labels int64 ``[N]``; read by a list of indices."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]

    def part(self, indices: Tensor) -> MemoryImages:
        """Those at ``indices``, int64 ``[n]``, alone."""
        return MemoryImages(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded when they are asked for: uint8 ``[B, 3, H, W]``, labels int64 ``[N]``.

    ``framing`` brings an image of Pillow's to size, such as a transform of torchvision.
    """

    # Bytes: each loader process would copy a million strings, as it counts references to them.
    paths: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: Tensor
    framing: Callable[[Any], Any]

    @classmethod
    def at(
        cls, paths: Sequence[str | Path], labels: Sequence[int], framing: Callable[[Any], Any]
    ) -> FileImages:
        """The files at ``paths``."""
        encoded = np.array([os.fsencode(path) for path in paths])
        return cls(encoded, torch.tensor(labels, dtype=torch.int64), framing)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        decoded = [self.framing(_read(os.fsdecode(bytes(self.paths[i])))) for i in indices]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in decoded]
        return torch.stack(pixels), self.labels[indices]

    def part(self, indices: Tensor) -> FileImages:
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])


Images = MemoryImages | FileImages


def centred(scaled: int, size: int) -> Any:
    """Scales the shorter side to ``scaled`` pixels and takes the centre, ``size`` in square."""
    v2 = optional_package("torchvision.transforms.v2")
    return v2.Compose([v2.Resize(scaled), v2.CenterCrop(size)])


def class_folders(
    root: Path, framing: Callable[[Any], Any]
) -> tuple[FileImages, dict[str, int], list[str]]:
    """The images below a folder for each class, as torchvision's ``ImageFolder`` finds them.

    Unlike that, it takes every format of :data:`FORMATS`, and leaves out what is hidden. Gives the
    images, the classes' numbers by name, and the paths of files that are neither images nor hidden.

    Raises OSError if there are no two classes, or one has no images.
    """
    make_dataset = optional_package("torchvision").datasets.folder.make_dataset
    known = optional_package("PIL.Image").registered_extensions()
    endings = tuple(ending for ending, kind in known.items() if kind in FORMATS)
    entries = sorted(entry for entry in root.iterdir() if visible(entry.name))
    names = [entry.name for entry in entries if entry.is_dir()]
    others = [str(entry) for entry in entries if not entry.is_dir()]
    if len(names) < 2:
        got = some([entry.name for entry in entries]) or "nothing"
        raise OSError(
            f"{root} must hold a folder of images for each of two classes or more, got {got}"
        )

    def is_image(path: str) -> bool:
        if not all(map(visible, Path(path).relative_to(root).parts)):
            return False
        if path.lower().endswith(endings):
            return True
        others.append(path)
        return False

    classes = {name: label for label, name in enumerate(names)}
    paths, labels = zip(*make_dataset(str(root), classes, is_valid_file=is_image), strict=True)
    return FileImages.at(paths, labels, framing), classes, others


def visible(name: str) -> bool:
    """Whether a file or folder is one that its user sees as such."""
    return not name.startswith(".") and name not in _OF_SYSTEMS


def _read(path: str) -> Any:
    """The first picture of an image file: upright, 8 bits of RGB, on white."""
    pillow, ops = optional_package("PIL.Image"), optional_package("PIL.ImageOps")
    with told(f"cannot read the image {path}"), pillow.open(path, formats=FORMATS) as image:
        if image.mode.startswith(("F", "I")):  # Pillow would cut its numbers off at 255
            raise ValueError("it has more than 8 bits a channel: save it with 8")
        upright = ops.exif_transpose(image)
        if upright.has_transparency_data:
            white = pillow.new("RGBA", upright.size, "white")
            upright = pillow.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")
