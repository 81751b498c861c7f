"""Snapshots of one model on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastfreeze.ensemble._checks import check_count
from fastfreeze.errors import SnapshotError

_MANIFEST = "manifest.json"
_FORMAT_VERSION = 1
_SNAPSHOT_FILE = re.compile(r"step-\d{8,}-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.(step-.*\.safetensors|manifest\.json)\.tmp")
_NAMED_AT_MOST = 3  # tensors of a kind in an error message

# Name of each tensor, in the state dict's order: its shape and its dtype's name.
_Signature = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in a store: what the manifest says about it.

    Attributes:
        step: optimizer steps completed when it was taken.
        cycle: cycle whose end it marks, from 0.
        metrics: numbers by name.
        time: when it was saved, ISO 8601, UTC.
        sha256: hash of the file's bytes.
    """

    step: int
    cycle: int
    metrics: Mapping[str, float] = field(hash=False)
    time: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of its file in the store's directory."""
        return f"step-{self.step:08}-{self.sha256[:16]}.safetensors"


@dataclass(frozen=True)
class _Manifest:
    signature: _Signature
    snapshots: tuple[Snapshot, ...]  # by step


class SnapshotStore:
    """Snapshots of one model in a directory: a safetensors file each, and a JSON manifest.

    Iterating yields each :class:`Snapshot`, by step. A file is written in full before the manifest
    names it, and each replaces its predecessor in one instant: whenever a run is killed, what was
    saved before is still there. Reading checks hashes, and unpickles nothing. One process at a time
    may write, any number may read.

    Args:
        directory: made on the first save if it is not there.

    Raises:
        SnapshotError: the manifest is there, but damaged.

    Example:
        >>> store = SnapshotStore("run/snapshots")
        >>> for step in range(schedule.total_steps):
        ...     train_step()
        ...     if step + 1 in schedule.cycle_ends:
        ...         store.save(model, step=step + 1, cycle=schedule.cycle_ends.index(step + 1))
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._read()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._read().snapshots)

    def __len__(self) -> int:
        return len(self._read().snapshots)

    def last(self, m: int) -> tuple[Snapshot, ...]:
        """The ``m`` snapshots of the highest steps, by step.

        Raises:
            ValueError: there are fewer, or ``m`` is below 1.
        """
        return last_of("m", m, self._read().snapshots)

    def save(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        step: int,
        cycle: int,
        metrics: Mapping[str, float] | None = None,
    ) -> Snapshot:
        """Save a model's weights and buffers, in the place of an earlier snapshot of that step.

        Args:
            model: the model, or its state dict. Tensors may be on any device, of any strides, and
                share memory; each is saved by itself.
            step: optimizer steps completed, >= 0.
            cycle: cycle that ends here, from 0.
            metrics: numbers to keep with the snapshot.

        Raises:
            TypeError, ValueError: a step or cycle that is not a count, a metric that is not a
                number, or a state dict's entry that is not a tensor.
            SnapshotError: the store holds snapshots of a model with other tensors.
        """
        check_count("step", step)
        check_count("cycle", cycle)
        numbers = _checked_metrics(metrics or {})
        tensors = _separate_tensors(_state_dict(model))
        signature = _signature(tensors)
        manifest = self._read()
        if manifest.snapshots:
            _check_signature(f"the model to be saved in {self}", signature, manifest.signature)
        data = safetensors.torch.save(tensors)
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        snapshot = Snapshot(step, cycle, numbers, time, hashlib.sha256(data).hexdigest())
        others = [s for s in manifest.snapshots if s.step != step]
        snapshots = tuple(sorted([*others, snapshot], key=lambda s: s.step))
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / snapshot.file, data)
        _write(self.directory / _MANIFEST, _manifest_bytes(_Manifest(signature, snapshots)))
        self._remove_orphans(keep={s.file for s in snapshots})
        return snapshot

    def load(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The state dict of a snapshot, on the CPU, its entries in the model's order.

        Raises:
            SnapshotError: the file is missing, or not as it was saved.
        """
        path = self.directory / snapshot.file
        if not _SNAPSHOT_FILE.fullmatch(path.name):
            raise SnapshotError(f"{snapshot!r} names no file that a store writes")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != snapshot.sha256:
            raise SnapshotError(
                f"{path} is truncated or altered: its sha256 is {found}, "
                f"it was saved with {snapshot.sha256}"
            )
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # its own error, or any that odd metadata provokes
            raise SnapshotError(f"{path} is not a safetensors file: {error}") from error
        signature = self._read().signature
        _check_signature(str(path), _signature(tensors), signature)
        return {name: tensors[name] for name in signature}

    def load_into(self, model: nn.Module, snapshot: Snapshot) -> None:
        """Copy a snapshot into a model, which is left as it was if that is not possible.

        Raises:
            SnapshotError: as :meth:`load`, or the model has other tensors.
        """
        load_into(model, self.load(snapshot), str(self.directory / snapshot.file))

    def _read(self) -> _Manifest:
        path = self.directory / _MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            # One file without a manifest is a first save that was killed.
            if len(self._files(_SNAPSHOT_FILE)) > 1:
                raise SnapshotError(f"{path} is missing, though there are snapshots") from None
            return _Manifest({}, ())
        try:
            return _parse_manifest(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"{path} is not a manifest of snapshots: {error!r}") from error

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [p for p in self.directory.iterdir() if pattern.fullmatch(p.name)]

    def _remove_orphans(self, keep: set[str]) -> None:
        """Remove what saves that were killed, or replaced, have left."""
        for path in [*self._files(_SNAPSHOT_FILE), *self._files(_TEMPORARY)]:
            if path.name not in keep:
                path.unlink()


def _state_dict(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _signature(state: Mapping[str, Tensor]) -> _Signature:
    return {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()
    }


def _check_state(label: str, state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{label} must be a state dict, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{label}[{name!r}] must be a tensor, got {type(value).__name__}")


def _check_signature(label: str, found: _Signature, expected: _Signature) -> None:
    """Raise a SnapshotError that names the first differences; the order does not matter."""
    missing = [repr(name) for name in expected if name not in found]
    unexpected = [repr(name) for name in found if name not in expected]
    unlike = [
        f"{name!r}: {_described(found[name])}, expected {_described(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "unlike": unlike}
    differences = [
        f"{kind}: {', '.join(names[:_NAMED_AT_MOST])}"
        + (f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else "")
        for kind, names in kinds.items()
        if names
    ]
    if differences:
        raise SnapshotError(f"{label} is of another model: " + "; ".join(differences))


def _described(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]} {list(spec[0])}"


def load_into(model: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    _check_state(label, state)
    _check_signature(label, _signature(state), _signature(model.state_dict()))
    model.load_state_dict(state)


def _separate_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors none of which shares memory with another, as safetensors wants."""
    _check_state("model", state)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return tensors


def _checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}") from error
    return numbers


def last_of(name: str, count: int, items: tuple[Any, ...]) -> tuple[Any, ...]:
    check_count(name, count, minimum=1)
    if count > len(items):
        raise ValueError(
            f"{name} must be at most {len(items)}, the snapshots there are, got {count}"
        )
    return items[-count:]


def _manifest_bytes(manifest: _Manifest) -> bytes:
    tensors = [
        {"name": name, "shape": list(shape), "dtype": dtype}
        for name, (shape, dtype) in manifest.signature.items()
    ]
    snapshots = [{"file": s.file, **asdict(s)} for s in manifest.snapshots]
    content = {"format_version": _FORMAT_VERSION, "tensors": tensors, "snapshots": snapshots}
    return json.dumps(content, indent=1).encode()


def _parse_manifest(content: Any) -> _Manifest:
    """What :func:`_manifest_bytes` wrote; otherwise one of the errors that bad data provokes."""
    if content["format_version"] != _FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {_FORMAT_VERSION}, got {content['format_version']!r}"
        )
    signature = {t["name"]: (tuple(t["shape"]), t["dtype"]) for t in content["tensors"]}
    snapshots = []
    for entry in content["snapshots"]:
        file = entry.pop("file")
        snapshot = Snapshot(**entry)
        check_count("step", snapshot.step)
        check_count("cycle", snapshot.cycle)
        _checked_metrics(snapshot.metrics)
        if file != snapshot.file or not _SNAPSHOT_FILE.fullmatch(file):
            raise ValueError(f"file must be the name of a snapshot, got {file!r}")
        snapshots.append(snapshot)
    steps = [s.step for s in snapshots]
    if steps != sorted(set(steps)):
        raise ValueError(f"steps must rise, got {steps}")
    return _Manifest(signature, tuple(snapshots))


def _write(path: Path, data: bytes) -> None:
    """Write a file such that at any moment either the old one or all of the new one is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
