"""What the softmax functions take, and which backend takes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.kernels import library
from fastfreeze.kernels.library import KERNEL_DTYPES, Backend
from fastfreeze.kernels.reference import sum_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What a launch can take: of CUDA, its arguments hold the members' addresses; of Triton, each number
# of members is compiled for itself, and a program's registers hold a row.
_MOST_MEMBERS: dict[Backend, int] = {"cuda": 128, "triton": 16}
_TRITON_CLASSES = 4096  # of fp64 half as many

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def member_list(members: Tensor | Sequence[Tensor], dim: int | None = None) -> list[Tensor]:
    """The logits of each member, their classes last, checked to be alike."""
    if isinstance(members, Tensor):
        if members.dim() < 3:
            raise ValueError(
                f"members as one tensor must have shape [M, ..., C] with a batch dimension, "
                f"got {tuple(members.shape)}"
            )
        logits = list(members.unbind(0))
    elif isinstance(members, (list, tuple)):
        logits = list(members)
    else:
        raise TypeError(
            f"members must be a tensor, or a list or tuple of tensors, got {kind_of(members)}"
        )
    if not logits:
        raise ValueError("members must hold at least one member, got none")
    check_logits("members[0]", logits[0], dim)
    _check_alike(logits)
    return [classes_last(z, dim) for z in logits]


def kind_of(value: object) -> str:
    """What was given where a tensor of another kind is expected, for messages."""
    if isinstance(value, np.ndarray):
        return "a NumPy array, of which torch.from_numpy makes a tensor"
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_logits(label: str, logits: Tensor, dim: int | None = None) -> None:
    """Raise unless it is a dense floating-point tensor with a batch and, in ``dim``, classes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{label} must be a tensor, got {kind_of(logits)}")
    if logits.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{label} must be float16, bfloat16, float32 or float64, got {logits.dtype}"
        )
    if logits.layout != torch.strided:
        raise TypeError(f"{label} must be a dense tensor, got layout {logits.layout}")
    if logits.dim() < 2:
        raise ValueError(
            f"{label} must have shape [..., C] with a batch dimension, got {tuple(logits.shape)}"
        )
    check_classes(label, logits, dim)


def check_classes(label: str, values: Tensor, dim: int | None) -> None:
    """Raise unless ``dim``, which None leaves to be the last, is one of two or more classes."""
    if dim is None and values.dim() > 3:
        raise ValueError(
            f"dim must say where the classes are in more than three dimensions, -1 or, in "
            f"[B, C, H, W], 1: {label} has shape {tuple(values.shape)}"
        )
    if dim is not None:
        check_int("dim", dim, -values.dim(), values.dim() - 1)
    if values.dim() == 0 or values.shape[-1 if dim is None else dim] < 2:
        raise ValueError(
            f"{label} must have C >= 2 classes, got shape {tuple(values.shape)}: the softmax of "
            f"one logit is 1, whatever it is. The ensemble of sigmoids or of regressions is the "
            f"mean of the members' own outputs"
        )


def classes_last(values: Tensor, dim: int | None) -> Tensor:
    """With the dimension of the classes last."""
    return values if dim in (None, -1) else values.movedim(dim, -1)


def classes_back(values: Tensor, dim: int | None) -> Tensor:
    """The inverse of :func:`classes_last`."""
    return values if dim in (None, -1) else values.movedim(-1, dim)


def _check_alike(members: list[Tensor]) -> None:
    first = members[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for m, logits in enumerate(members):
        if not isinstance(logits, Tensor):
            raise TypeError(f"members[{m}] must be a tensor, got {kind_of(logits)}")
        if logits.shape != shape or logits.dtype != dtype or logits.device != device:
            raise ValueError(
                f"members[{m}] must be like members[0]: expected "
                f"{described(shape, dtype, device)}, "
                f"got {described(logits.shape, logits.dtype, logits.device)}"
            )


def described(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """For messages."""
    return f"shape {tuple(shape)}, {dtype}, {device}"


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float] | None:
    """The weights divided by their sum; None for a plain mean."""
    if weights is None:
        return None
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list or tuple, got {type(weights).__name__}")
    if len(weights) != count:
        raise ValueError(f"weights must be one for each of {count} members, got {len(weights)}")
    for m, weight in enumerate(weights):
        check_weight(f"weights[{m}]", weight)
    total = sum(weights)
    if not 0 < total < math.inf:
        raise ValueError(f"weights must have a finite sum > 0, got {weights}")
    return [weight / total for weight in weights]


def check_weight(label: str, weight: float) -> None:
    """Raise unless ``weight`` is a finite number >= 0."""
    if not isinstance(weight, (int, float)):
        raise TypeError(f"{label} must be a number, got {weight!r}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{label} must be finite and >= 0, got {weight!r}")


def checked_temperature(temperature: float) -> float:
    """The temperature as a float. Beyond the bounds float32 could not hold it and its inverse."""
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature must be from 1e-30 to 1e30, got {temperature!r}")
    return float(temperature)


def checked_labels(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """The labels of the rows of ``logits`` as int64; looked at where that waits for no device."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be a tensor of integers, got {kind_of(labels)}")
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if labels.shape != rows or labels.device != logits.device:
        raise ValueError(
            f"labels must have shape {tuple(rows)} on {logits.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if _readable(labels):
        bad = ((labels < 0) | (labels >= classes)).nonzero()
        if len(bad):
            row = bad[0].tolist()
            found = labels[tuple(row)].item()
            raise ValueError(f"labels{row} must be in 0..{classes - 1}, got {found}")
    return labels.long()


def new_statistics(first: Tensor, with_nll: bool) -> Statistics:
    """Memory for the statistics of logits like ``first``, in ``ensemble_statistics``' order."""
    rows, dtype = first.shape[:-1], sum_dtype(first.dtype)
    maximum, entropy, mutual_information = (first.new_empty(rows, dtype=dtype) for _ in range(3))
    argmax = first.new_empty(rows, dtype=torch.int64)
    nll = first.new_empty(rows if with_nll else (0,), dtype=dtype)
    return first.new_empty(first.shape), maximum, argmax, entropy, mutual_information, nll


def _readable(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.is_cpu


def check_rows(result: Tensor, members: list[Tensor], label: str) -> None:
    """Raise for the first bad row. A bad row comes out NaN throughout, so one column tells.

    ``label`` names a member, its number put in the place of {}. Results of a GPU are not looked
    at: that would wait for it.
    """
    if not _readable(result) or not math.isnan(result.select(-1, 0).sum().item()):
        return
    for m, logits in enumerate(members):
        highest = logits.detach().amax(-1)  # NaN if there is one
        bad = highest.isfinite().logical_not().nonzero()
        if len(bad):
            row = bad[0].tolist()
            found = highest[tuple(row)].item()
            what = "-inf throughout" if found == -math.inf else str(found)
            raise ValueError(
                f"{label.format(m)}{row} must be finite, or -inf for some classes, got {what}"
            )


def choose_backend(backend: Backend | None, label: str, members: Sequence[Tensor]) -> Backend:
    """The backend asked for if it can take the members, or else the fastest that can."""
    first, count, classes = members[0], len(members), members[0].shape[-1]
    if backend is None and type(first) not in (Tensor, torch.nn.Parameter):
        return "reference"

    def refuses(name: Backend) -> str | None:
        most = _MOST_MEMBERS.get(name, count)
        if count > most:
            return f"there are {count} members, at most {most} are possible"
        most = _TRITON_CLASSES // (2 if first.dtype == torch.float64 else 1)
        if name == "triton" and classes > most:
            return f"there are {classes} classes, at most {most} are possible"
        return None

    return library.choose(backend, first.device, label, refuses)
