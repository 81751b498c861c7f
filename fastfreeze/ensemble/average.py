"""One model from several snapshots: the average of their weights.

Source of the method: Averaging Weights Leads to Wider Optima and Better Generalization (Izmailov et
al., UAI 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fastfreeze.checks import check_int
from fastfreeze.ensemble._checks import call_and_labels
from fastfreeze.kernels.softmax_arguments import normalised_weights
from fastfreeze.snapshots.base import check_state
from fastfreeze.snapshots.format import Signature, check_signature, signature_of
from fastfreeze.trimming.bits import same_bits


@torch.no_grad()
def average_weights(
    states: Iterable[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The average of snapshots of one model (Izmailov et al., UAI 2018).

    One pass, which keeps no state dict: each tensor is summed in float64 from where it begins to
    differ, and rounded once. Tensors that hold the same bits in all snapshots, as those of frozen
    layers, come out with these bits. Of integers and booleans, such as a norm's
    ``num_batches_tracked``, the last snapshot's are taken.

    The statistics of norms are averaged too, but are not those of the averaged weights: see
    :func:`reestimate_norms`.

    Args:
        states: state dicts of the same names, shapes and dtypes; they may come one at a time, and
            be on several devices.
        weights: one finite number >= 0 for each, of which the sum is > 0: their shares, which are
            divided by the sum. A snapshot of weight 0 does not count. None: equal shares.

    Returns:
        A state dict of tensors of its own, of the snapshots' dtypes, in the order and on the device
        of the first. Tied tensors are equal under each of their names.

    Raises:
        TypeError: one of ``states`` is not a state dict, or ``weights`` is not a list or tuple of
            numbers.
        ValueError: no state dict, or weights that are not such.
        SnapshotError: a state dict of another architecture than the first.

    Example:
        >>> states = [store.load(snapshot) for snapshot in store.last(3)]
        >>> model.load_state_dict(average_weights(states))
        <All keys matched successfully>
        >>> names = reestimate_norms(model, batches, snapshot=states[-1])
    """
    num_weights = len(weights) if isinstance(weights, (list, tuple)) else 0
    shares = normalised_weights(weights, num_weights)
    averages: dict[str, _Average] = {}
    signature: Signature | None = None
    count = 0
    for i, state in enumerate(states):
        signature = _checked_signature(f"states[{i}]", state, signature)
        if not averages:
            averages = {name: _Average() for name in state}
        count += 1
        if shares is not None and count > num_weights:
            break
        share = 1.0 if shares is None else shares[i]
        if share > 0:
            for name, average in averages.items():
                average.add(state[name], share)
    if count == 0:
        raise ValueError("states must hold at least one state dict, got none")
    if shares is not None and count != num_weights:
        found = f"{count} or more" if count > num_weights else count
        raise ValueError(f"weights must be one for each of {found} states, got {num_weights}")
    return {name: average.result() for name, average in averages.items()}


class _Average:
    """The weighted mean of tensors that come one at a time."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the latest, if of integers
        self._sum: Tensor | None = None  # None while all hold the same bits
        self._weight = 0.0

    def add(self, tensor: Tensor, weight: float) -> None:
        """Take in a tensor of the first one's shape and dtype."""
        tensor = tensor.detach()
        if self._first is None:
            self._first = tensor.clone()
        tensor = tensor.to(self._first.device)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            self._first = tensor.clone()
        elif self._sum is not None:
            self._sum.add_(_wide(tensor), alpha=weight)
        elif not same_bits(self._first, tensor):
            self._sum = (_wide(self._first) * self._weight).add_(_wide(tensor), alpha=weight)
            self._first = self._first.new_empty(0)  # its dtype and device are all that is needed
        self._weight += weight

    def result(self) -> Tensor:
        assert self._first is not None
        if self._sum is None:
            return self._first
        mean = self._sum / self._weight
        if self._first.is_complex():
            mean = torch.view_as_complex(mean)
        return mean.to(self._first.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float64; of complex numbers, pairs of them."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64)


def _checked_signature(label: str, state: Any, expected: Signature | None) -> Signature:
    """That of the first state dict, which the others must have."""
    check_state(label, state)
    found = signature_of(state)
    if expected is None:
        return found
    check_signature(label, found, expected)
    return expected


@torch.no_grad()
def reestimate_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    snapshot: Mapping[str, Tensor] | None = None,
    num_batches: int | None = None,
) -> tuple[str, ...]:
    """Give the norms of a model the running statistics that its weights make (Izmailov et al.).

    Averaged weights need that: the snapshots' statistics are of other activations. As
    ``torch.optim.swa_utils.update_bn`` it takes the plain mean of the batches' statistics, each
    batch with equal weight, but

    - in float64, and for instance norms with ``track_running_stats`` too;
    - with all other modules in eval mode: without dropout, as the model will be used. Dropout
      before a norm would raise the variance that it sees (Li et al., CVPR 2019);
    - norms that no batch reaches keep their statistics;
    - with ``snapshot``, norms that were frozen in all snapshots keep theirs bit for bit, and run in
      eval mode. ``requires_grad`` does not count: at the end of a FreezeOut run most layers are
      frozen, and yet their weights differ between snapshots.

    Whatever is raised, also by the model or by ``batches``, the statistics are left as they were.
    Modes and momenta are always restored.

    Args:
        model: holds the average; not what :func:`fastfreeze.trim` makes of it. What is compiled in
            it runs uncompiled.
        batches: tensors, tuples or lists of which the first item is the model's input, or dicts,
            as a ``DataLoader`` gives, on the model's device. A tuple or list of inputs is passed as
            several arguments, a dict by name, without its "labels". Take training data, in batches
            as large as in training.
        snapshot: state dict of one of the averaged snapshots. A norm whose statistics are the same
            bits there and in the model was frozen in all of them. None: no norm was.
        num_batches: read at most so many, >= 1. None: all.

    Returns:
        Names of the norms that have new statistics, in the order of ``model.named_modules()``.
        Without a norm to re-estimate no batch is read.

    Raises:
        TypeError, ValueError: a norm is lazy and has not run yet, or the model itself sets it to
            eval mode, as a trimmed model does with frozen ones; no batch, or an argument is not
            such.
        SnapshotError: ``snapshot`` is of another architecture.
    """
    if num_batches is not None:
        check_int("num_batches", num_batches, minimum=1)
    norms = _norms_to_reestimate(model, snapshot)
    if not norms:
        return ()
    training = [(module, module.training) for module in model.modules()]
    estimates = [_Estimate(name, norm) for name, norm in norms.items()]
    try:
        for module, _ in training:
            module.training = False
        for estimate in estimates:
            estimate.begin()
        with torch.compiler.set_stance("force_eager"):  # else compiled anew for the hooks
            _run(model, islice(batches, num_batches))
        return tuple(estimate.name for estimate in estimates if estimate.accept())
    finally:
        for module, mode in training:
            module.training = mode
        for estimate in estimates:
            estimate.end()


def _norms_to_reestimate(
    model: nn.Module, snapshot: Mapping[str, Tensor] | None
) -> dict[str, _NormBase]:
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            if is_lazy(module.running_mean):
                raise ValueError(f"{name!r} is a lazy norm: the model must run once before")
            norms[name] = module
    if snapshot is None:
        return norms
    _checked_signature("snapshot", snapshot, signature_of(model.state_dict()))

    def was_frozen(name: str, norm: _NormBase) -> bool:
        prefix = f"{name}." if name else ""
        return all(
            same_bits(held, snapshot[prefix + own].to(held.device))
            for own, held in norm.named_buffers(recurse=False)
            if own.startswith("running_")
        )

    return {name: norm for name, norm in norms.items() if not was_frozen(name, norm)}


def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    count = 0
    for batch in batches:
        (inputs, keywords), _ = call_and_labels(f"batches[{count}]", batch)
        model(*inputs, **keywords)
        count += 1
    if count == 0:
        raise ValueError("batches must give at least one batch, got none")


class _Estimate:
    """The mean of a norm's statistics over its calls."""

    def __init__(self, name: str, norm: _NormBase) -> None:
        self.name, self._norm, self._momentum = name, norm, norm.momentum
        self._statistics = [b for b in (norm.running_mean, norm.running_var) if b is not None]
        self._totals = [torch.zeros_like(b, dtype=torch.float64) for b in self._statistics]
        self._count = 0
        self._hook: RemovableHandle | None = None
        self._before = [(b, b.clone()) for b in norm.buffers(recurse=False)]

    def begin(self) -> None:
        """Have each call leave its own statistics in the norm."""
        self._hook = self._norm.register_forward_hook(self._add)
        self._norm.training = True
        self._norm.momentum = 1.0
        self._norm.reset_running_stats()  # NaN would stay, whatever the momentum

    def accept(self) -> bool:
        """Give the norm the mean; False if it was not called."""
        if self._count == 0:
            return False
        self._before = []
        for held, total in zip(self._statistics, self._totals, strict=True):
            held.copy_(total / self._count)
        return True

    def end(self) -> None:
        """Leave the norm as it was, but for what was accepted."""
        if self._hook is not None:
            self._hook.remove()
        self._norm.momentum = self._momentum
        for held, values in self._before:
            held.copy_(values)

    def _add(self, *_: Any) -> None:
        if not self._norm.training:
            raise ValueError(
                f"model must not call {self.name!r} in eval mode: statistics of batches are wanted"
            )
        for held, total in zip(self._statistics, self._totals, strict=True):
            total.add_(held)
        self._count += 1
