"""Networks by what a user types, the papers', others' or the user's own; pretrained weights."""

from __future__ import annotations

import copy
import difflib
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastfreeze.layers.split import LayerPlan, split
from fastfreeze.recipes.errors import RecipeError, optional_package, told
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.names import OTHER_MODELS
from fastfreeze.text import some


def is_own(name: str) -> bool:
    """Whether a name is MODULE:FUNCTION, the user's own."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in ("torchvision", "timm")


def outline(name: str, **sizes: int) -> nn.Module:
    """The network of :func:`build_network` without values: on the meta device.

    A user's own has values, and is where its function leaves it.
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

    Raises:
        ValueError: no network has that name, or takes such images.
        RecipeError: torchvision or timm is not installed, or a user's own cannot be imported or
            built.
    """
    source, colon, rest = name.partition(":")
    if is_own(name):
        return _own_network(name)
    if colon:
        build = _torchvision_network if source == "torchvision" else _timm_network
        return build(rest, num_classes, in_channels)
    try:
        return build_model(
            name, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride
        )
    except ValueError as error:
        others = ", ".join(OTHER_MODELS)
        raise ValueError(f"{error} (beside these there are {others})") from error


def check_network(name: str, network: nn.Module, images: Tensor, num_classes: int) -> None:
    """Raise unless a network can be trained on images, and gives a number for each class.

    It runs on ``images``, the smallest batch ``[B, C, H, W]`` of a training, once in training mode
    and then in eval mode, in which it stays.

    Raises:
        RecipeError: it cannot be trained; the message is one line.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise RecipeError(f"{name} has no parameter that requires grad: nothing can be trained")
    if any(map(is_lazy, network.parameters())):
        raise RecipeError(f"{name} has uninitialised parameters: run it once where it is made")
    shape, wanted = list(images.shape), [len(images), num_classes]
    for training in (True, False):
        network.train(training)
        with told(f"{name} cannot take a batch of the shape {shape}"), torch.no_grad():
            found: Any = network(images)
        said = type(found).__name__
        if isinstance(found, Tensor):
            if list(found.shape) == wanted and found.is_floating_point():
                continue
            said = f"{found.dtype} of the shape {list(found.shape)}"
        raise RecipeError(
            f"{name} must give a floating-point tensor of the shape {wanted}, a number for each "
            f"class, for a batch of the shape {shape}; got {said}"
        )


def load_weights(network: nn.Module, path: str) -> None:
    """Load a state dict into a network, all but its head, which stays as it is.

    The head is the last module with parameters of its own. A network on the meta device is only
    compared with the file, and of no use afterwards.

    Args:
        network: of which every other tensor comes from the file.
        path: a file of torch.save, in which nothing but tensors is unpickled, or of safetensors.

    Raises:
        RecipeError: the file cannot be read, is no state dict, or does not fit the network; the
            message names the keys.
    """
    own, is_meta = network.state_dict(), next(network.parameters()).is_meta
    *_, head = (n for n, m in network.named_modules() if any(True for _ in m.parameters(False)))
    weights = {k: v for k, v in _state_dict(path).items() if not k.startswith(f"{head}.")}
    wrong = [
        f"{key} is {list(value.shape)} and must be {list(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if not wrong:
        # Files from before norms counted their batches lack the counts: torch makes up for that.
        found = network.load_state_dict(weights, strict=False, assign=is_meta)
        missing = [key for key in found.missing_keys if not key.startswith(f"{head}.")]
        for what, keys in (("lacks", missing), ("has besides", found.unexpected_keys)):
            wrong += [f"it {what} {some(keys)}"] if keys else []
    if wrong:
        wrapped = all(key.startswith("module.") for key in weights)
        hint = " (all names begin with module.: it is of a wrapped network)" * wrapped
        raise RecipeError(
            f"--weights {path} does not fit the network (but for its head, {head}, which is new): "
            f"{some(wrong)}{hint}"
        )


def _state_dict(path: str) -> dict[str, Tensor]:
    with told(f"cannot read --weights {path}, which must hold a state dict, a tensor by each name"):
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for key, value in found.items():
            if not isinstance(value, Tensor):
                got = f"{type(value).__name__} by {key!r}"
                raise TypeError(f"got {got}: save that part of it alone")
        return found


def layers_of(name: str, network: nn.Module, images: Tensor) -> tuple[LayerPlan, list[str]]:
    """A network's layers, and what :func:`fastfreeze.split` warns of.

    Raises:
        RecipeError: it cannot be split; the message is one line.
    """
    shape = list(images.shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with told(f"{name} cannot be split with images of the shape {shape}"):
            plan = split(network, images)
    return plan, [str(warning.message) for warning in caught]


def _check_known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known)) or "resnet18"
        raise ValueError(f"{what} {name!r}; try {near}")


def _torchvision_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    models = optional_package("torchvision").models
    known = models.list_models(module=models)
    _check_known(name, known, "torchvision has no classification network")
    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, not of {in_channels}")
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return network


def _timm_network(name: str, num_classes: int, in_channels: int) -> nn.Module:
    timm = optional_package("timm", "pip install timm")
    _check_known(name.partition(".")[0], timm.list_models(), "timm has no network")
    network: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    return network


def _own_network(name: str) -> nn.Module:
    """What the function returns; modules in the working directory are found too."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"must be MODULE:FUNCTION, got {name}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with told(f"cannot import {module}"):
        found: Any = importlib.import_module(module)
    for part in function.split("."):
        if not hasattr(found, part):
            near = ", ".join(difflib.get_close_matches(part, dir(found)))
            did = f"; did you mean {near}?" if near else ""
            raise RecipeError(f"{module} has no {function}{did}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"{name} must be a function, got {type(found).__name__}")
    if not isinstance(found, nn.Module):
        with told(f"{name}() failed"):
            found = found()
    if not isinstance(found, nn.Module):
        raise RecipeError(f"{name}() must return an nn.Module, got {type(found).__name__}")
    with told(f"{name} cannot be copied, which a training does with it (give it __deepcopy__)"):
        return copy.deepcopy(found)
