"""In what layout a model is given its images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from fastfreeze.trimming.compare import difference, observe
from fastfreeze.trimming.operations import is_cpu_fp32
from fastfreeze.trimming.state import copied, hooked

_MOST = 8
# Products with a value, times weights for a value: at 20 one is as fast as the other (oneDNN, one
# thread): DenseNet-121 and all with grouped convolutions are below, ResNets at 64x64 above.
_MOST_PRODUCTS = 20


@dataclass(frozen=True)
class Layout:
    """How a model takes images of one size.

    Attributes:
        channels_last: whether they are to be given in channels_last.
        outputs: which tensors of the output are to be contiguous, as the model gives them.
    """

    channels_last: bool
    outputs: tuple[bool, ...] = ()

    def given_back(self, output: Any) -> Any:
        """The output as the model gives it: its user may take views of it."""
        if not any(self.outputs):
            return output
        flags = iter(self.outputs)
        return tree_map_only(Tensor, lambda t: t.contiguous() if next(flags, False) else t, output)


class Layouts:
    """What is known of how a model takes images.

    Convolutions reorder values in the usual layout, and weights for images in channels_last, where
    their inner loops are slower, too. So channels_last pays where there are many values for each
    weight, and few multiplications with each value. Counts decide, for a batch of 32: what a batch
    really holds, or a clock, must not matter, or a resumed run would not give the same bits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[torch.Size, ...], Layout] = {}

    def of(self, args: Any, kwargs: Any) -> Layout | None:
        """How to call the model; None where there are no images in torch's usual layout."""
        sizes = tuple([t.shape[1:] for t in tree_leaves((args, kwargs)) if _may_be_images(t)])
        if not sizes:
            return None
        known = self._known.get(sizes)
        if known is not None:
            return known
        if len(self._known) >= _MOST or _has_any_global_hook() or hooked(self._model.modules()):
            return Layout(False)
        with _parameters_kept(self._model):
            found = self._known[sizes] = self._find(args, kwargs)
        return found

    def _is_of_convolutions_and_norms(self) -> bool:
        """Whether about each convolution has a batch norm.

        Without norms to fold little is gained; and more of them, or group norms, are slower in
        channels_last than what the convolutions gain.
        """
        modules = list(self._model.modules())
        norms = sum(isinstance(m, _BatchNorm) for m in modules)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in modules)
        grouped = any(isinstance(m, nn.GroupNorm) for m in modules)
        return not grouped and 0.5 * convolutions <= norms <= 1.2 * convolutions

    def _find(self, args: Any, kwargs: Any) -> Layout:
        if not self._is_of_convolutions_and_norms():
            return Layout(False)
        products = weights = values = 0
        handles = []
        given = copied((args, kwargs))

        def count(module: Any, inputs: Any, value: Any) -> None:
            nonlocal products, weights, values
            if len(value):
                products += value[0].numel() * module.weight[0].numel()
                weights += module.weight.numel() if module.weight.is_contiguous() else 0
                values += sum(t[0].numel() for t in (*inputs, value))

        def run() -> Any:
            for module in self._model.modules():
                if type(module) is nn.Conv2d:
                    handles.append(module.register_forward_hook(count))
            return self._model(*given[0], **given[1])

        try:
            expected = observe(self._model, run)
        finally:
            for handle in handles:
                handle.remove()
        written = any(t._version for t in tree_leaves(given) if isinstance(t, Tensor))
        few = products * weights < _MOST_PRODUCTS * 32 * values**2
        if written or not few:
            return Layout(False)
        given = in_channels_last(*copied((args, kwargs)))
        try:
            found = observe(self._model, lambda: self._model(*given[0], **given[1]))
        except Exception:  # of whatever kind: it keeps the layout that it was written for
            return Layout(False)
        if difference(found, replace(expected, gradient={})):
            return Layout(False)
        outputs = [t is not None and t.is_contiguous() for t in expected.output.values()]
        return Layout(True, tuple(outputs))


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Undo, on leaving, what the model writes to its parameters."""
    before = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, version, values in before:
                if parameter._version != version:
                    parameter.copy_(values)


def in_channels_last(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with images in channels_last."""

    def laid_out(tensor: Tensor) -> Tensor:
        if not _may_be_images(tensor):
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    found: tuple[Any, Any] = tree_map_only(Tensor, laid_out, (args, kwargs))
    return found


def are_channels_last(args: Any, kwargs: Any) -> bool:
    """Whether there are images, and in channels_last."""
    return any(
        isinstance(t, Tensor)
        and t.dim() == 4
        and not t.is_contiguous()
        and t.is_contiguous(memory_format=torch.channels_last)
        for t in tree_leaves((args, kwargs))
    )


def _may_be_images(value: Any) -> bool:
    """Whether it has the shape of images, in another layout than channels_last."""
    if not isinstance(value, Tensor) or value.dim() != 4 or not is_cpu_fp32(value):
        return False
    if value.requires_grad or not value.is_contiguous():
        return False
    return not value.is_contiguous(memory_format=torch.channels_last)
