"""Networks by what a user types: the papers', torchvision's, or the user's own."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastfreeze.layers.split import LayerPlan, split
from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.names import MODEL_NAMES, OTHER_MODELS

_PACKAGES = ("torchvision", "timm")  # whose networks have names of their own


def is_own(name: str) -> bool:
    """Whether a name is MODULE:FUNCTION, the user's own."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in _PACKAGES


def check_name(name: str) -> None:
    """Raise ValueError where no network can have this name; a user's own is not imported."""
    if is_own(name):
        _module_and_function(name)
    else:
        outline(name)


def outline(name: str, **sizes: int) -> nn.Module:
    """The network as :func:`build_network` makes it, to be looked at alone: on the meta device.

    A user's own is wherever its function leaves it.
    """
    if is_own(name):
        return build_network(name)
    try:
        with torch.device("meta"):
            return build_network(name, **sizes)
    except RecipeError:
        raise
    except RuntimeError:  # RegNet adds up its widths in tensors, which need values for that
        return build_network(name, **sizes).to("meta")


def build_network(
    name: str, *, num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> nn.Module:
    """A network by its name, with freshly drawn weights.

    Args:
        name: as in :func:`fastfreeze.recipes.models.build_model`; ``torchvision:NAME``, a
            classification network of torchvision; ``timm:NAME``, one of timm; or
            ``MODULE:FUNCTION``, where the function takes no arguments and returns the network, of
            which a copy is trained. ``FUNCTION`` may be a module, too.
        num_classes, in_channels, stem_stride: as in :func:`~fastfreeze.recipes.models.build_model`;
            a user's own decides for itself, and torchvision's and timm's have no ``stem_stride``.

    Returns:
        A module from images ``[B, in_channels, H, W]`` to logits ``[B, num_classes]``; whether a
        user's own is that, :func:`check_network` tells.

    Raises:
        ValueError: no network has that name, or takes such images.
        RecipeError: torchvision or timm is not installed, or a user's own cannot be imported or
            built.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    source, colon, rest = name.partition(":")
    if is_own(name):
        return _own_network(name)
    if colon:
        return (_torchvision_network if source == "torchvision" else _timm_network)(rest, **sizes)
    try:
        return build_model(name, **sizes, stem_stride=stem_stride)
    except ValueError as error:
        known = {example: example for example in MODEL_NAMES.values()}
        if importlib.util.find_spec("torchvision") is not None:
            known |= {theirs: f"torchvision:{theirs}" for theirs in _torchvision_names()}
        near = _near(name, known)
        others = f"beside these there are {', '.join(OTHER_MODELS)}"
        raise ValueError(f"{error} ({f'near it: {near}; ' if near else ''}{others})") from error


def check_network(name: str, network: nn.Module, images: Tensor, num_classes: int) -> None:
    """See that a network can be trained on images, and gives a number for each class.

    Args:
        name: of the network, for messages.
        network: runs once in training mode and once in eval mode; the latter stays.
        images: the smallest batch of a training, ``[B, C, H, W]``, where the network is.
        num_classes: >= 1.

    Raises:
        RecipeError: it cannot; the message is one line.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise RecipeError(f"{name} has no parameter that requires grad: nothing can be trained")
    if any(map(is_lazy, network.parameters())):
        raise RecipeError(f"{name} has uninitialised parameters: run it once where it is made")
    shape = list(images.shape)
    for training in (True, False):
        network.train(training)
        with _told(f"{name} cannot take a batch of the shape {shape}"), torch.no_grad():
            found: Any = network(images)
        wanted = [len(images), num_classes]
        if not isinstance(found, Tensor):
            said = type(found).__name__
        elif list(found.shape) == wanted and found.is_floating_point():
            continue
        else:
            said = f"{found.dtype} of the shape {list(found.shape)}"
        raise RecipeError(
            f"{name} must give a floating-point tensor of the shape {wanted}, a number for each "
            f"class, for a batch of the shape {shape}; got {said}"
        )


def layers_of(name: str, network: nn.Module, images: Tensor) -> tuple[LayerPlan, list[str]]:
    """A network's layers, and what :func:`fastfreeze.split` warns of.

    Raises:
        RecipeError: it cannot be split; the message is one line.
    """
    with (
        warnings.catch_warnings(record=True) as caught,
        _told(f"{name} cannot be split with images of the shape {list(images.shape)}"),
    ):
        warnings.simplefilter("always")
        plan = split(network, images)
    return plan, [str(warning.message) for warning in caught]


def _torchvision_names() -> Sequence[str]:
    models = optional_package("torchvision").models
    names: list[str] = models.list_models(module=models)
    return names


def _near(name: str, known: Mapping[str, str]) -> str:
    """What a user may have meant by a name that is no network's, or nothing."""
    found = [name] if name in known else difflib.get_close_matches(name, known)
    return ", ".join(known[other] for other in found)


def _torchvision_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    known = {name: name for name in _torchvision_names()}
    if name not in known:
        near = _near(name, known) or "resnet18"
        raise ValueError(f"torchvision has no classification network {name!r}; try {near}")
    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, not of {in_channels}")
    models = optional_package("torchvision").models
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return network


def _timm_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    timm = optional_package("timm", "pip install timm")
    if not timm.is_model(name):
        near = _near(name, {known: known for known in timm.list_models()}) or "resnet18"
        raise ValueError(f"timm has no network {name!r}; try {near}")
    network: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    return network


def _module_and_function(name: str) -> tuple[str, str]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"must be MODULE:FUNCTION, got {name}")
    return module, function


def _own_network(name: str) -> nn.Module:
    """What the function returns; modules in the working directory are found too."""
    module, function = _module_and_function(name)
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _told(f"cannot import {module}"):
        found: Any = importlib.import_module(module)
    for part in function.split("."):
        if not hasattr(found, part):
            near = _near(part, {name: name for name in dir(found)})
            did = f"; did you mean {near}?" if near else ""
            raise RecipeError(f"{module} has no {function}{did}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"{name} must be a function, got {type(found).__name__}")
    if not isinstance(found, nn.Module):
        with _told(f"{name}() failed"):
            found = found()
    if not isinstance(found, nn.Module):
        raise RecipeError(f"{name}() must return an nn.Module, got {type(found).__name__}")
    with _told(f"{name} cannot be copied, which a training does with it (give it __deepcopy__)"):
        return copy.deepcopy(found)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A user's code inside may fail in any way; it is told in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise RecipeError(f"{what}: {said}") from error
