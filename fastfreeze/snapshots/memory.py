"""Snapshots of one model in memory."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastfreeze.snapshots.base import Snapshots, checked_to_save, facts_of
from fastfreeze.snapshots.format import Snapshot, check_signature, signature_of
from fastfreeze.snapshots.tensors import copy_of
from fastfreeze.trimming.bits import same_bits


class MemorySnapshots(Snapshots):
    """Snapshots of one model in memory, used as a :class:`SnapshotStore` is.

    A save is done when it returns: there is no ``wait``, and no ``flush``. A tensor that holds the
    same bits as in the snapshot before takes no memory again.

    Args:
        device: where to keep them; None: each tensor where it is.

    Raises:
        TypeError: ``device`` is none.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        if not isinstance(device, torch.device | str | None):
            raise TypeError(f"device must be a torch.device, a string or None, got {device!r}")
        # That of a tensor, as "cuda" is one of them.
        self._device = None if device is None else torch.empty(0, device=device).device
        self._lock = threading.Lock()
        self._states: list[tuple[Snapshot, dict[str, Tensor]]] = []  # by step

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._states)} snapshots)"

    def save(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        step: int,
        cycle: int,
        metrics: Mapping[str, float] | None = None,
    ) -> Snapshot:
        """Save a model's weights and buffers, in the place of an earlier snapshot of that step.

        Args and errors are those of :meth:`SnapshotStore.save`. They are copied when it returns,
        in the order of the current stream.
        """
        facts = facts_of(step, cycle, metrics)
        state, signature = checked_to_save(model)
        with self._lock:
            if self._states:
                expected = signature_of(self._states[0][1])
                check_signature(f"the model to be saved in {self}", signature, expected)
            before = next((held for s, held in reversed(self._states) if s.step <= step), {})
            kept = {name: self._kept(t, before.get(name)) for name, t in state.items()}
            others = [pair for pair in self._states if pair[0].step != step]
            self._states = sorted([*others, (facts, kept)], key=lambda pair: pair[0].step)
        return facts

    def load(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Copies of a snapshot's tensors, where they are kept.

        Raises:
            SnapshotError: the snapshot is not there.
        """
        return {name: t.clone() for name, t in self._find(self._states, snapshot).items()}

    def _kept(self, tensor: Tensor, before: Tensor | None) -> Tensor:
        """``before`` if it holds the same, else a copy."""
        device = tensor.device if self._device is None else self._device
        here = tensor if tensor.device == device else copy_of(tensor, device)
        if before is not None and same_bits(here, before):
            return before
        return copy_of(tensor, device) if here is tensor else here

    def _held(self) -> Sequence[tuple[Snapshot, dict[str, Tensor]]]:
        return self._states

    def _key(self, snapshot: Snapshot) -> Hashable:
        return id(snapshot)

    def _discard(self, gone: set[Hashable]) -> None:
        with self._lock:
            self._states = [pair for pair in self._states if self._key(pair[0]) not in gone]
