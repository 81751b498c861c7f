"""Two ways of running a model, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import fp32_precision, tensors_in

Tensors = dict[str, Tensor | None]
Observation = tuple[Any, dict[str, Tensors]]  # the output's nested types; tensors by kind and name
_EPSILONS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def observe(model: nn.Module, run: Callable[[], Any]) -> Observation:
    """What ``run`` gives, buffers, and gradients of the parameters that require grad.

    None for a parameter without one. The model and the random number generators are left as they
    were.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with preserved(model), torch.enable_grad():
        output = run()
        outputs = list(tensors_in(output))
        gradients = _gradients(outputs, list(trained.values()))
        return _structure(output), {
            "gradient": dict(zip(trained, gradients, strict=True)),
            "output": {str(i): t.detach() for i, t in enumerate(outputs)},
            "buffer": {n: b.detach().clone() for n, b in model.named_buffers()},
        }


def difference(found: Observation, expected: Observation) -> str:
    """The greatest difference, in words; empty if there is none beyond rounding."""
    if found[0] != expected[0]:
        return f"output is {found[0]}, not {expected[0]}"
    worst, text = 1.0, ""
    for kind, a in found[1].items():
        b = expected[1][kind]
        floor = 1e-3 * max((_magnitude(t) for t in b.values() if t is not None), default=0.0)
        for name in sorted(a.keys() | b.keys()):
            error, tolerance = _error(a.get(name), b.get(name), floor)
            if error > worst * tolerance:
                worst = error / tolerance
                text = f"{kind} {name!r} differs, relative error {error:.1e}"
    return text


def excess(found: Any, expected: Any) -> float:
    """The greatest difference between tensors, as a multiple of what rounding may explain."""
    if _structure(found) != _structure(expected):
        return math.inf
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    errors = [_error(a, b, 0.0) for a, b in pairs]
    return max((error / rounding for error, rounding in errors), default=0.0)


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


def _error(a: Tensor | None, b: Tensor | None, floor: float) -> tuple[float, float]:
    """Relative error of ``a``, and how much of it rounding may explain."""
    if a is None or b is None:
        return (0.0 if a is b else math.inf), 1.0
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf, 1.0
    if torch.equal(a, b):
        return 0.0, 1.0
    if not b.is_floating_point() or not torch.equal(a.isnan(), b.isnan()):
        return math.inf, 1.0
    error = (a.double() - b.double()).nan_to_num().abs().max().item()
    if not error:  # but for NaN, of which there are as many
        return 0.0, 1.0
    scale = max(_magnitude(b), floor)
    return (error / scale if scale else math.inf), math.sqrt(_epsilon(b))


def _epsilon(tensor: Tensor) -> float:
    """What one rounding may change, relatively: by default a GPU's convolutions keep 10 bits."""
    precisions = fp32_precision(tensor.device) if tensor.dtype == torch.float32 else ()
    epsilons = [torch.finfo(tensor.dtype).eps, *(_EPSILONS.get(p, 0.0) for p in precisions)]
    return max(epsilons)


def _magnitude(tensor: Tensor) -> float:
    return tensor.double().nan_to_num().abs().max().item() if tensor.numel() else 0.0
