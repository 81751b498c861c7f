"""Checks of batches, and of models' inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfreeze.errors import warn
from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax_arguments import kind_of

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by name


def call_and_labels(label: str, batch: Any) -> tuple[Call, Any]:
    """How a model is called on a batch, and the batch's labels; None if it has none.

    The labels are "labels" of a dict, and the second of a tuple or list of two; the rest, or the
    first, is the input. An input that is a dict is passed by name, a tuple or list as several
    arguments.
    """
    labels = None
    if isinstance(batch, Mapping):
        inputs: Any = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 0:
            raise ValueError(f"{label} must hold the model's input, got {batch!r}")
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    else:
        inputs = batch
    call: Call
    if isinstance(inputs, Mapping):
        call = (), dict(inputs)
    else:
        call = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    check_no_arrays(label, [*call[0], *call[1].values(), labels])
    return call, labels


def check_no_arrays(label: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, np.ndarray):
            raise TypeError(f"{label} must hold tensors, got {kind_of(value)}")


def logits_of(output: Any) -> Any:
    """The logits in a model's output: a tensor itself, or what an object or dict calls so."""
    if isinstance(output, Tensor):
        return output
    is_dict = isinstance(output, Mapping)
    logits = output.get("logits") if is_dict else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor: the model must return one, or something with `logits`, "
            f"got {kind_of(output if logits is None else logits)}"
        )
    return logits


def warn_of_probabilities(logits: Tensor, dim: int | None) -> None:
    """Warn if all rows may come from a softmax, which gives more than zeros and ones."""
    values = logits.detach().to(sum_dtype(logits.dtype))
    tolerance = max(1e-4, torch.finfo(logits.dtype).eps)
    sums_to_1 = (values.sum(-1 if dim is None else dim) - 1).abs() <= tolerance
    inside = (values > 0) & (values < 1)
    if bool(sums_to_1.all() & (values >= 0).all() & inside.any()):
        warn(
            "model returns probabilities, not logits: they are >= 0 and sum to 1, and would get a "
            "second softmax. Let it return what goes into its softmax, or their logarithms"
        )
