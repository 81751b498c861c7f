"""Averages of an ensemble's softmax probabilities: of all members at once, or one at a time.

Logits are never stacked: the kernels read each member's where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfreeze.ops import _library
from fastfreeze.ops._library import Backend
from fastfreeze.ops.reference import (
    ensemble_softmax_reference,
    softmax_add_reference,
    sum_dtype,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ensemble_softmax(
    members: Tensor | Sequence[Tensor], *, backend: Backend | None = None
) -> Tensor:
    """Mean over the members of an ensemble of their softmax probabilities.

    Probabilities are averaged, not logits, as in Snapshot Ensembles (Huang et al., ICLR 2017).
    They are computed and summed in float32 (float64 for float64 logits) and rounded once.
    Differentiable, any number of times, and traced by ``torch.compile``.

    Args:
        members: logits of M >= 1 members, as one tensor [M, ..., C] or a sequence of M tensors
            [..., C] of one shape, dtype and device: at least one batch dimension, of any size, and
            C >= 1 classes, last. float16, bfloat16, float32 or float64. Rows of unit stride are
            read in place, whatever lies between them. ``-inf`` masks a class.
        backend: "cpu" or "reference"; None chooses the fastest that can take the members.

    Returns:
        Probabilities [..., C], contiguous, of the members' dtype. The same bits for every number
        of threads.

    Raises:
        TypeError: ``members`` is not made of dense floating-point tensors.
        ValueError: shapes, dtypes or devices do not go together; a row with NaN or +inf, or with
            nothing but -inf (not looked for under ``torch.compile``, where such a row comes out
            NaN); or members that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    logits = _member_list(members)
    _check_logits("members[0]", logits[0])
    _check_alike(logits)
    if _choose_backend(backend, "members", logits[0]) == "cpu":
        mean: Tensor = torch.ops.fastfreeze.ensemble_softmax.default(logits)
    else:
        mean = ensemble_softmax_reference(logits)
    _check_rows(mean, logits, "members[{}]")
    return mean


class EnsembleAverage:
    """Mean of the softmax probabilities of members that come one at a time.

    Keeps two sums of the shape of the logits, in float32 (float64 for float64 logits), and nothing
    else of the members. Gradients do not flow through it.

    Args:
        backend: as in :func:`ensemble_softmax`.

    Example:
        >>> average = EnsembleAverage()
        >>> for model in models:
        ...     average.update(model(x))
        >>> probabilities = average.mean()
    """

    def __init__(self, *, backend: Backend | None = None) -> None:
        if backend is not None:
            _library.require(backend)
        self._backend = backend
        self._total: Tensor | None = None
        self._spare: Tensor | None = None  # the next sum's memory: a bad member leaves the total
        self._dtype = torch.float32
        self._count = 0

    @property
    def count(self) -> int:
        """How many members there were."""
        return self._count

    def update(self, logits: Tensor) -> None:
        """Take in a member.

        Args:
            logits: [..., C], as :func:`ensemble_softmax` takes them; of the first member's shape,
                dtype and device.

        Raises:
            TypeError, ValueError: as :func:`ensemble_softmax`; the average is left as it was.
        """
        _check_logits("logits", logits)
        if self._total is not None:
            expected = (self._total.shape, self._dtype, self._total.device)
            if expected != (logits.shape, logits.dtype, logits.device):
                raise ValueError(
                    f"logits must be like the first update's: expected {_described(*expected)}, "
                    f"got {_described(logits.shape, logits.dtype, logits.device)}"
                )
        with torch.no_grad():
            total = self._plus(logits)
        _check_rows(total, [logits], "logits")
        self._total, self._spare = total, self._total
        self._dtype, self._count = logits.dtype, self._count + 1

    def _plus(self, logits: Tensor) -> Tensor:
        if _choose_backend(self._backend, "logits", logits) != "cpu":
            return softmax_add_reference(self._total, logits)
        out = self._spare
        if out is None:
            out = torch.empty(logits.shape, dtype=sum_dtype(logits.dtype))
        torch.ops.fastfreeze.softmax_add.default(out, self._total, logits.detach())
        return out

    def mean(self) -> Tensor:
        """The mean of the members' probabilities: [..., C], of the logits' dtype.

        Raises:
            RuntimeError: there was no member yet.
        """
        if self._total is None:
            raise RuntimeError("the mean of no members: update(logits) comes first")
        return (self._total / self._count).to(self._dtype)


def _member_list(members: Tensor | Sequence[Tensor]) -> list[Tensor]:
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
            f"members must be a tensor, or a list or tuple of tensors, got {type(members).__name__}"
        )
    if not logits:
        raise ValueError("members must hold at least one member, got none")
    return logits


def _check_logits(label: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(
            f"{label} must be float16, bfloat16, float32 or float64, got {logits.dtype}"
        )
    if logits.layout != torch.strided:
        raise TypeError(f"{label} must be a dense tensor, got layout {logits.layout}")
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(
            f"{label} must have shape [..., C] with a batch dimension and C >= 1, "
            f"got {tuple(logits.shape)}"
        )


def _check_alike(members: list[Tensor]) -> None:
    first = members[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for m, logits in enumerate(members):
        if not isinstance(logits, Tensor):
            raise TypeError(f"members[{m}] must be a tensor, got {type(logits).__name__}")
        if logits.shape != shape or logits.dtype != dtype or logits.device != device:
            raise ValueError(
                f"members[{m}] must be like members[0]: expected "
                f"{_described(shape, dtype, device)}, "
                f"got {_described(logits.shape, logits.dtype, logits.device)}"
            )


def _described(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {tuple(shape)}, {dtype}, {device}"


def _choose_backend(backend: Backend | None, label: str, logits: Tensor) -> Backend:
    """The backend asked for if it can take ``logits``, or else the fastest that can."""
    if backend is None:
        plain = type(logits) in (Tensor, torch.nn.Parameter)
        has_cpu = _library.backends()["cpu"].available
        return "cpu" if plain and logits.is_cpu and has_cpu else "reference"
    _library.require(backend)
    if backend not in ("cpu", "reference"):
        raise ValueError(f"backend={backend!r} has no ensemble softmax; use 'cpu' or 'reference'")
    if backend == "cpu" and not logits.is_cpu:
        raise ValueError(f"backend='cpu' cannot take {label}: on {logits.device}")
    return backend


def _check_rows(result: Tensor, members: list[Tensor], label: str) -> None:
    """Raise for the first bad row. A bad row comes out NaN throughout, so one column tells.

    ``label`` names a member, its number put in the place of {}.
    """
    if torch.compiler.is_compiling() or type(result) is not Tensor or result.is_meta:
        return
    if not math.isnan(result.select(-1, 0).sum().item()):
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


def _fake_mean(members: list[Tensor]) -> Tensor:
    return members[0].new_empty(members[0].shape)


def _fake_add(result: Tensor, total: Tensor | None, logits: Tensor) -> None:
    pass


def _save_members(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _mean_backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """``p * (g - sum(g * p)) / M`` for each member, its softmax p computed anew."""
    members = ctx.saved_tensors
    gradients: list[Tensor | None] = []
    for logits, needed in zip(members, ctx.needs_input_grad[0], strict=True):
        if not needed:
            gradients.append(None)
            continue
        p = torch.softmax(logits, dim=-1, dtype=sum_dtype(logits.dtype))
        g = grad.to(p.dtype) / len(members)
        gradients.append((p * (g - (g * p).sum(-1, keepdim=True))).to(logits.dtype))
    return gradients


torch.library.register_fake("fastfreeze::ensemble_softmax", _fake_mean)
torch.library.register_fake("fastfreeze::softmax_add", _fake_add)
torch.library.register_autograd(
    "fastfreeze::ensemble_softmax", _mean_backward, setup_context=_save_members
)
