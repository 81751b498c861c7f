"""Pretrained weights from a file, for a network with a head of its own."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastfreeze.recipes.errors import RecipeError
from fastfreeze.text import some


def load_weights(network: nn.Module, path: str) -> None:
    """Load a state dict into a network, all but its head, which stays as it is.

    The head is the last module with parameters of its own. Whatever the file holds for it is passed
    over.

    Args:
        network: of which every other tensor comes from the file. On the meta device what does not
            fit is told, and the network is of no use afterwards.
        path: a file of torch.save, in which nothing but tensors is unpickled, or of safetensors.

    Raises:
        RecipeError: the file cannot be read, is no state dict, or does not fit the network; the
            message names the keys.
    """
    own, is_meta = network.state_dict(), next(network.parameters()).is_meta
    *_, head = (n for n, m in network.named_modules() if any(True for _ in m.parameters(False)))
    weights = {k: v for k, v in _read(path).items() if not k.startswith(f"{head}.")}
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
        raise RecipeError(
            f"--weights {path} does not fit the network (but for its head, {head}, which is new): "
            f"{some(wrong)}"
        )


def _read(path: str) -> dict[str, Tensor]:
    must = "must hold a state dict, a tensor by each name"
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        said = " ".join(f"{type(error).__name__}: {error}".split())
        said = said.partition(". ")[0][:200]  # torch goes on with how to load what is not trusted
        raise RecipeError(f"cannot read --weights {path}, which {must}: {said}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"--weights {path} {must}; got {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            got = f"{type(value).__name__} by {key!r}"
            raise RecipeError(f"--weights {path} {must}; got {got}: save that part of it alone")
    return found
