"""The ensemble that snapshots make.

Source of the method: Snapshot Ensembles (Huang et al., ICLR 2017).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.ensemble.snapshots import SnapshotStore, last_of, load_into
from fastfreeze.ops.softmax import EnsembleAverage, ensemble_softmax


class SnapshotEnsemble(nn.Module):
    """Averages the probabilities of snapshots of one model.

    The members are copies of the model, always in eval mode, and without gradients of their own;
    ``to``, ``state_dict`` and so on work as for any module.

    Args:
        model: a model of the snapshots' architecture, of whatever weights; it is not changed.
        snapshots: state dicts, the latest last.
        last: use only so many, the latest. Early snapshots of short cycles can hurt.

    Raises:
        TypeError: one of ``snapshots`` is not a state dict.
        ValueError: no snapshot, or fewer than ``last``.
        SnapshotError: a snapshot of another architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        snapshots: Iterable[Mapping[str, Tensor]],
        *,
        last: int | None = None,
    ) -> None:
        super().__init__()
        chosen = snapshots if last is None else last_of("last", last, tuple(snapshots))
        self.members = nn.ModuleList()
        for i, state in enumerate(chosen):
            member = copy.deepcopy(model)
            load_into(member, state, f"snapshots[{i}]")
            self.members.append(member.eval().requires_grad_(False))
        if not self.members:
            raise ValueError("snapshots must hold at least one state dict, got none")

    @classmethod
    def from_store(
        cls, model: nn.Module, store: SnapshotStore, last: int | None = None
    ) -> SnapshotEnsemble:
        """The ensemble of a store's snapshots, or of its ``last`` ones."""
        chosen = tuple(store) if last is None else store.last(last)
        return cls(model, (store.load(snapshot) for snapshot in chosen))

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """The mean of the members' probabilities.

        Members run one after the other, and only a sum is kept, unless gradients are to flow to
        the inputs.

        Args:
            inputs, keywords: the model's; it must return logits [..., C].

        Returns:
            Probabilities [..., C], of the logits' dtype.

        Raises:
            TypeError, ValueError: the model's output is not what
                :func:`~fastfreeze.ops.softmax.ensemble_softmax` takes.
        """
        first, *others = self.members
        logits = first(*inputs, **keywords)
        if isinstance(logits, Tensor) and logits.requires_grad:
            return ensemble_softmax([logits, *[m(*inputs, **keywords) for m in others]])
        average = EnsembleAverage()
        average.update(logits)
        for member in others:
            average.update(member(*inputs, **keywords))
        return average.mean()

    def member_probabilities(self, *inputs: Any, **keywords: Any) -> Iterator[Tensor]:
        """The probabilities [..., C] of each member in turn."""
        for member in self.members:
            yield torch.softmax(member(*inputs, **keywords), dim=-1)

    def train(self, mode: bool = True) -> SnapshotEnsemble:
        """Set the flag ``training``; the members stay in eval mode."""
        super().train(mode)
        self.members.eval()
        return self
