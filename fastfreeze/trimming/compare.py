"""Two ways of running a model, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import fp32_precision, tensors_in

Tensors = dict[str, Tensor | None]
_EPSILONS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def check_alike(
    model: nn.Module,
    found: Callable[..., Any],
    expected: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    """Compare two ways of running a model: outputs, buffers, and gradients of what trains.

    The model and the random number generators are left as they were.

    Raises:
        RuntimeError: they differ by more than rounding; the message names the worst.
    """
    own, others = _observed(model, found, args, kwargs), _observed(model, expected, args, kwargs)
    worst, text = 1.0, ""
    if own[0] != others[0]:
        worst, text = math.inf, f"output is {own[0]}, not {others[0]}"
    for kind, b in others[1].items():
        a, floor = own[1][kind], 1e-3 * max((_magnitude(t) for t in b.values()), default=0.0)
        for name in sorted(a.keys() | b.keys()):
            times = _error(a.get(name), b.get(name), floor)
            if times > worst:
                worst, text = times, f"{kind} {name!r} differs by {times:.1e} times rounding"
    if text:
        raise RuntimeError(f"trimmed {type(model).__name__}: {text}")


def _observed(
    model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, dict[str, Tensors]]:
    """The nested types of what ``run`` gives, and tensors by kind and name."""
    copies = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with preserved(model), torch.enable_grad():
        output = run(*copies)
        outputs = list(tensors_in(output))
        gradients = _gradients(outputs, list(trained.values()))
        return _structure(output), {
            "gradient": dict(zip(trained, gradients, strict=True)),
            "output": {str(i): t.detach() for i, t in enumerate(outputs)},
            "buffer": {n: b.detach().clone() for n, b in model.named_buffers()},
        }


def excess(found: Any, expected: Any) -> float:
    """The greatest difference between tensors, as a multiple of what rounding may explain."""
    if _structure(found) != _structure(expected):
        return math.inf
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    return max((_error(a, b, 0.0) for a, b in pairs), default=0.0)


def _structure(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value), [_structure(item) for item in value]
    if isinstance(value, dict):
        return type(value), {key: _structure(item) for key, item in value.items()}
    return type(value)


def _gradients(outputs: list[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a sum of all outputs, with weights that no norm or softmax cancels."""
    differentiable = [t for t in outputs if t.requires_grad]
    if not (differentiable and parameters):
        return [None] * len(parameters)
    weights = [
        torch.arange(t.numel(), device=t.device).cos().to(t.dtype).view(t.shape)
        for t in differentiable
    ]
    return torch.autograd.grad(differentiable, parameters, weights, allow_unused=True)


def _error(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    """Of ``a``, relative to the greatest of ``b``, in multiples of what rounding may explain."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    if not b.is_floating_point() or not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    error = _magnitude(a.double() - b.double())
    if not error:  # but for NaN, of which there are as many
        return 0.0
    scale = max(_magnitude(b), floor)
    return error / scale / math.sqrt(_epsilon(b)) if scale else math.inf


def _epsilon(tensor: Tensor) -> float:
    """What one rounding may change, relatively: by default a GPU's convolutions keep 10 bits."""
    precisions = fp32_precision(tensor.device) if tensor.dtype == torch.float32 else ()
    epsilons = [torch.finfo(tensor.dtype).eps, *(_EPSILONS.get(p, 0.0) for p in precisions)]
    return max(epsilons)


def _magnitude(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel():
        return 0.0
    return tensor.double().nan_to_num().abs().max().item()
