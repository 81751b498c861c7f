"""What both places for snapshots do: the disk and the memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from fastfreeze.checks import check_int
from fastfreeze.errors import SnapshotError
from fastfreeze.files import write_atomic
from fastfreeze.snapshots.format import Signature, Snapshot, check_signature, signature_of
from fastfreeze.snapshots.tensors import can_be_stored, dtype_name

_Contents = TypeVar("_Contents")
StateDict = Mapping[str, Tensor]


class Snapshots(ABC):
    """Snapshots of one model, on disk or in memory. Iterating yields them, by step."""

    def __iter__(self) -> Iterator[Snapshot]:
        return iter([snapshot for snapshot, _ in self._held()])

    def __len__(self) -> int:
        return len(self._held())

    def last(self, m: int) -> tuple[Snapshot, ...]:
        """The ``m`` snapshots of the highest steps, by step.

        Raises:
            ValueError: there are fewer, or ``m`` is below 1.
        """
        return last_of("m", m, tuple(self))

    @abstractmethod
    def load(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The state dict of a snapshot, the caller's own."""

    def load_into(self, model: nn.Module, snapshot: Snapshot) -> None:
        """Copy a snapshot into a model, which is left as it was if that is not possible.

        Raises:
            SnapshotError: as :meth:`load`, or the model has other tensors.
        """
        load_into(model, self.load(snapshot), f"step {snapshot.step} of {self}")

    def export(self, snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
        """Write the state dict of a snapshot as one safetensors file, which is replaced whole.

        Tied weights are written under each of their names.

        Raises:
            SnapshotError: as :meth:`load`.
            OSError: the file cannot be written.
        """
        state = {name: t.cpu() for name, t in self.load(snapshot).items()}
        write_atomic(Path(path), safetensors.torch.save(state, metadata={"format": "pt"}))

    def remove(self, snapshot: Snapshot) -> None:
        """Remove a snapshot, and give back what it alone takes up.

        Raises:
            SnapshotError: it is not there.
        """
        self._find(self._held(), snapshot)
        self._discard({self._key(snapshot)})

    def prune(self, keep: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
        """Remove all snapshots but some, and give back what they take up.

        Args:
            keep: those to keep, such as ``store.last(3)``.

        Returns:
            What was removed, by step.

        Raises:
            SnapshotError: one of ``keep`` is not there.
        """
        there, kept = self._held(), list(keep)
        for snapshot in kept:
            self._find(there, snapshot)
        keys = set(map(self._key, kept))
        gone = tuple(s for s, _ in there if self._key(s) not in keys)
        if gone:
            self._discard(set(map(self._key, gone)))
        return gone

    def _find(self, held: Iterable[tuple[Snapshot, _Contents]], snapshot: Snapshot) -> _Contents:
        """What is held of a snapshot."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot must be a Snapshot, got {snapshot!r}")
        for own, contents in held:
            if self._key(own) == self._key(snapshot):
                return contents
        raise SnapshotError(f"{snapshot!r} is not in {self}")

    @abstractmethod
    def _held(self) -> Sequence[tuple[Snapshot, Any]]:
        """All snapshots by step, and what is held of each."""

    @abstractmethod
    def _key(self, snapshot: Snapshot) -> Hashable:
        """What tells a snapshot from all others that are, or were, in its place."""

    @abstractmethod
    def _discard(self, gone: set[Hashable]) -> None:
        """Remove the snapshots of these keys; some may be gone already."""


def facts_of(step: int, cycle: int, metrics: Mapping[str, float] | None) -> Snapshot:
    """A snapshot that has no hash yet."""
    check_int("step", step, minimum=0)
    check_int("cycle", cycle, minimum=0)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Snapshot(step, cycle, _numbers(metrics or {}), time)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """As Python's floats."""
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}") from error
        except OverflowError as error:
            raise ValueError(f"metrics[{name!r}] must fit into a float: {error}") from error
    return numbers


def checked_to_save(model: nn.Module | StateDict) -> tuple[StateDict, Signature]:
    """The state dict of what is to be saved, and its signature."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    signature = check_state("model", state)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or not can_be_stored(tensor.dtype):
            kind = "meta" if tensor.is_meta else f"{tensor.layout} {dtype_name(tensor.dtype)}"
            raise TypeError(
                f"model[{name!r}] must be a dense tensor of a dtype of safetensors, got {kind}"
            )
    return state, signature


def check_state(label: str, state: Any, expected: Signature | None = None) -> Signature:
    """The signature of a state dict; raises unless it is one, and of the expected signature."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{label} must be a state dict, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"{label} must have strings for names, got {name!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{label}[{name!r}] must be a tensor, got {type(value).__name__}")
    found = signature_of(state)
    if expected is not None:
        check_signature(label, found, expected)
    return found


def load_into(model: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    """Copy a state dict into a model, which is left as it was if it has other tensors."""
    check_state(label, state, signature_of(model.state_dict()))
    model.load_state_dict(state)


def last_of(name: str, count: int, items: tuple[Any, ...]) -> tuple[Any, ...]:
    check_int(name, count, minimum=1)
    if count > len(items):
        raise ValueError(
            f"{name} must be at most {len(items)}, the snapshots there are, got {count}"
        )
    return items[-count:]
