"""Networks by what a user types: the papers', torchvision's, or the user's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn

from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.models import build_model


@dataclass(frozen=True)
class Example:
    """What images a network is given; None where the network decides."""

    num_classes: int | None
    in_channels: int
    image_size: int | None


def network_and_images(model: str, example: Example) -> tuple[nn.Module, Tensor]:
    """The network, and two images ``[2, C, H, W]`` for it, on the device where it is.

    Networks that are built here are on the meta device: they are only looked at. A user's own is
    wherever its function leaves it, and its images are zeros on the CPU.

    Raises:
        click.UsageError: no network has that name, or it cannot take such images.
        RecipeError: a user's own cannot be imported or built; the message is one line.
    """
    source, colon, name = model.partition(":")
    large = source == "torchvision" or model.startswith("imagenet-")
    size = example.image_size or (224 if large else 32)
    shape = (2, example.in_channels, size, size)
    if colon and source != "torchvision":
        if example.num_classes is not None:
            raise click.UsageError(f"--num-classes is not for {model}, which takes no arguments")
        return _own_network(source, name), torch.zeros(shape)
    num_classes = example.num_classes or (1000 if large else 10)
    with torch.device("meta"):
        if colon:
            network = _torchvision_network(name, num_classes, example.in_channels)
        else:
            network = _papers_network(model, num_classes, example.in_channels)
        return network, torch.empty(shape)


def _papers_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        return build_model(name, num_classes=num_classes, in_channels=in_channels)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; or torchvision:NAME, or MODULE:FUNCTION", param_hint="MODEL"
        ) from error


def _torchvision_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    models = optional_package("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known) or known[:3])
        raise click.BadParameter(
            f"torchvision has no classification network {name!r}; try {near}", param_hint="MODEL"
        )
    if in_channels != 3:
        raise click.UsageError(f"--in-channels must be 3 for torchvision:{name}, got {in_channels}")
    network: nn.Module
    try:
        network = models.get_model(name, weights=None, num_classes=num_classes)
    except RuntimeError:  # RegNet adds up its widths in tensors, which need values for that
        with torch.device("cpu"):
            network = models.get_model(name, weights=None, num_classes=num_classes).to("meta")
    return network


def _own_network(module: str, function: str) -> nn.Module:
    """What ``function`` of ``module`` returns; modules in the working directory are found too."""
    if not module or not function:
        raise click.BadParameter(
            f"must be MODULE:FUNCTION, got {module}:{function}", param_hint="MODEL"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _told(f"cannot import {module}"):
        found: Any = importlib.import_module(module)
    for name in function.split("."):
        if not hasattr(found, name):
            raise RecipeError(f"{module} has no {function}")
        found = getattr(found, name)
    if not callable(found):
        raise RecipeError(f"{module}:{function} must be a function, got {type(found).__name__}")
    if not isinstance(found, nn.Module):
        with _told(f"{module}:{function}() failed"):
            found = found()
    if not isinstance(found, nn.Module):
        raise RecipeError(
            f"{module}:{function}() must return an nn.Module, got {type(found).__name__}"
        )
    return found


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A user's code inside may fail in any way; it is told in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RecipeError(f"{what}: {said}") from error
