"""One model from several snapshots: the average of their weights.

Source of the method: Averaging Weights Leads to Wider Optima and Better Generalization (Izmailov et
al., UAI 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fastfreeze.ensemble._checks import call_and_labels
from fastfreeze.layers.execution import preserved
from fastfreeze.snapshots.base import check_state
from fastfreeze.snapshots.format import Signature, signature_of
from fastfreeze.trimming.bits import same_bits


@torch.no_grad()
def average_weights(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The average of snapshots of one model (Izmailov et al., UAI 2018).

    It reads each state dict once and keeps none: it sums tensors in float64 and rounds once. A
    tensor with the same bits in all snapshots, as in frozen layers, keeps these bits. Integers and
    booleans, such as a norm's ``num_batches_tracked``, are the last snapshot's.

    The statistics of norms are averaged too, but are not those of the averaged weights: see
    :func:`reestimate_norms`.

    Args:
        states: state dicts of the same names, shapes and dtypes; they may come one at a time, and
            be on several devices.

    Returns:
        A state dict of tensors of its own, of the snapshots' dtypes, in the order and on the device
        of the first. Tied tensors are equal under each of their names.

    Raises:
        TypeError: one of ``states`` is not a state dict.
        ValueError: there is no state dict.
        SnapshotError: a state dict is of another architecture than the first.

    Example:
        >>> states = [store.load(snapshot) for snapshot in store.last(3)]
        >>> model.load_state_dict(average_weights(states))
        <All keys matched successfully>
        >>> names = reestimate_norms(model, batches, snapshot=states[-1])
    """
    averages: dict[str, _Average] = {}
    signature: Signature | None = None
    for i, state in enumerate(states):
        signature = check_state(f"states[{i}]", state, signature)
        averages = averages or {name: _Average(t) for name, t in state.items()}
        for name, average in averages.items():
            average.add(state[name])
    if signature is None:
        raise ValueError("states must hold at least one state dict, got none")
    return {name: average.result() for name, average in averages.items()}


class _Average:
    """The mean of tensors of one shape and dtype that come one at a time."""

    def __init__(self, first: Tensor) -> None:
        self._first = first.detach().clone()  # of integers the latest
        self._sum: Tensor | None = None  # None while all hold the same bits
        self.count = 0

    def add(self, tensor: Tensor) -> None:
        tensor = tensor.detach().to(self._first.device)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            self._first = tensor.clone()
        elif self._sum is not None:
            self._sum += _wide(tensor)
        elif not same_bits(self._first, tensor):
            self._sum = _wide(self._first) * self.count + _wide(tensor)
            self._first = self._first.new_empty(0)  # its dtype and device are all that is needed
        self.count += 1

    def result(self) -> Tensor:
        if self._sum is None:
            return self._first
        mean = self._sum / self.count
        if self._first.is_complex():
            mean = torch.view_as_complex(mean)
        return mean.to(self._first.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float64; a complex one as pairs of real numbers."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.double()


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, batches: Iterable[Any], *, snapshot: Mapping[str, Tensor] | None = None
) -> tuple[str, ...]:
    """Give the norms of a model the running statistics that its weights make (Izmailov et al.).

    Averaged weights need that: the snapshots' statistics are of other activations. As
    ``torch.optim.swa_utils.update_bn`` it takes the plain mean of the batches' statistics, but

    - in float64, and for instance norms with ``track_running_stats`` too;
    - with all other modules in eval mode, as the model will be used. Dropout before a norm would
      raise the variance that the norm sees (Li et al., CVPR 2019);
    - norms that no batch reaches keep their statistics;
    - with ``snapshot``, norms that were frozen in all snapshots keep theirs bit for bit, and run in
      eval mode. ``requires_grad`` does not count: at the end of a FreezeOut run most layers are
      frozen, and yet their weights differ between snapshots.

    Nothing else of the model changes, and nothing at all if the model or ``batches`` raises.

    Args:
        model: holds the average. What is compiled in it runs uncompiled.
        batches: tensors, tuples or lists of which the first item is the model's input, or dicts,
            on the model's device. A tuple or list of inputs is passed as several arguments, a dict
            by name, without its "labels". Take training data, in batches as large as in training.
        snapshot: the state dict of one of the averaged snapshots. A norm whose statistics have the
            same bits there and in the model was frozen in all of them. None: no norm was.

    Returns:
        Names of the norms that have new statistics, in the order of ``model.named_modules()``.
        Without such norms no batch is read.

    Raises:
        TypeError, ValueError: there is no batch, or a batch is not such; a norm is lazy and has not
            run yet, or the model itself sets it to eval mode.
        SnapshotError: ``snapshot`` is of another architecture.
    """
    norms = _norms_to_reestimate(model, snapshot)
    if not norms:
        return ()
    averages: dict[Any, list[_Average]] = {}

    def add(norm: Any, *_: Any) -> None:
        """Add the statistics that this call has left in the norm."""
        if not norm.training:
            raise ValueError(
                f"model must not call {norms[norm]!r} in eval mode: "
                "statistics of batches are wanted"
            )
        found = _statistics(norm)
        own = averages.setdefault(norm, [_Average(statistic) for statistic in found])
        for average, statistic in zip(own, found, strict=True):
            average.add(statistic)

    modes = [(module, module.training) for module in model.modules()]
    # Uncompiled, else it would be compiled anew for the hooks.
    with preserved(model), torch.compiler.set_stance("force_eager"):
        try:
            for module, _ in modes:
                module.training = module in norms
            for norm in norms:
                norm.momentum = 1.0
                norm.reset_running_stats()  # NaN would stay, whatever the momentum
                norm.register_forward_hook(add)
            i = None
            for i, batch in enumerate(batches):
                (inputs, keywords), _ = call_and_labels(f"batches[{i}]", batch)
                model(*inputs, **keywords)
            if i is None:
                raise ValueError("batches must give at least one batch, got none")
        finally:
            for module, mode in modes:  # a trimmed model's is that of the model in it
                module.training = mode
    for norm, own in averages.items():
        for held, average in zip(_statistics(norm), own, strict=True):
            held.copy_(average.result())
        norm.num_batches_tracked.fill_(own[0].count)
    return tuple(name for norm, name in norms.items() if norm in averages)


_STATISTICS = ("running_mean", "running_var")


def _statistics(norm: Any) -> list[Tensor]:
    return [getattr(norm, name) for name in _STATISTICS]


def _norms_to_reestimate(model: nn.Module, snapshot: Mapping[str, Tensor] | None) -> dict[Any, str]:
    """The norms that are not frozen, with their names."""
    norms: dict[Any, str] = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    for norm, name in norms.items():
        if is_lazy(norm.running_mean):
            raise ValueError(f"{name!r} is a lazy norm: the model must run once before")
    if snapshot is None:
        return norms
    check_state("snapshot", snapshot, signature_of(model.state_dict()))

    def changed(norm: Any, name: str) -> bool:
        before = [snapshot[f"{name}.{own}".lstrip(".")] for own in _STATISTICS]
        pairs = zip(_statistics(norm), before, strict=True)
        return not all(same_bits(a, b.to(a.device)) for a, b in pairs)

    return {norm: name for norm, name in norms.items() if changed(norm, name)}
