"""Snapshots of one model on disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastfreeze.errors import SnapshotError, warn
from fastfreeze.files import FileLock, lock_file, read_file, remove_temporaries, write_atomic
from fastfreeze.snapshots.background import Background
from fastfreeze.snapshots.base import Snapshots, checked_to_save, facts_of
from fastfreeze.snapshots.format import (
    Entry,
    Manifest,
    Signature,
    Snapshot,
    check_signature,
    manifest_bytes,
    parse_manifest,
    state_hash,
)
from fastfreeze.snapshots.tensors import (
    content_hash,
    copy_of,
    is_intact,
    read_tensor,
    tensor_files,
    tensor_path,
    write_tensors,
)
from fastfreeze.text import some

_MANIFEST = "manifest.json"
_LOCK = ".lock"
_CPU = torch.device("cpu")


class SnapshotStore(Snapshots):
    """Snapshots of one model in a directory: safetensors files, and a JSON manifest.

    Iterating yields each :class:`Snapshot`, by step. Each tensor has a file that is named by the
    hash of its content, so that snapshots hold the same bits once. Tensors are written in full
    before the manifest names them, and each file is replaced in one instant: whenever a run is
    killed, what was saved before is still there. Reading checks the hash of each tensor, and
    unpickles nothing.

    One process at a time may write, with any number of threads and stores of the directory; others
    are refused. Its turn ends when it ends, or when none of its stores that have written is left.
    Any number may read. Symbolic links are neither read nor written through.

    Snapshots that an earlier run has left in the directory stay in the store, and come into its
    ensembles, until a save of the same step replaces them. A new run takes a directory of its own,
    or first empties the old one by ``store.prune(keep=[])``.

    Args:
        directory: is made on the first save if it is not there.

    Raises:
        TypeError: ``directory`` is no path.
        SnapshotError: the directory is a file; or the manifest is damaged, no plain file, or of
            another version.

    Example:
        >>> store = SnapshotStore("run/snapshots")
        >>> for step in range(schedule.total_steps):
        ...     train_step()
        ...     if step + 1 in schedule.cycle_ends:
        ...         cycle = schedule.cycle_ends.index(step + 1)
        ...         store.save(model, step=step + 1, cycle=cycle, wait=False)
        >>> store.flush()
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory must be a path, got {directory!r}")
        self.directory = Path(directory).absolute()  # the working directory may change
        self._lock: FileLock | None = None  # once it has written
        self._background = Background()
        self._has_begun = False  # a save has looked at what earlier runs have left
        self._read()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def __reduce__(self) -> tuple[type[SnapshotStore], tuple[Path]]:
        self.flush()
        return type(self), (self.directory,)

    def save(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        step: int,
        cycle: int,
        metrics: Mapping[str, float] | None = None,
        wait: bool = True,
    ) -> Snapshot | None:
        """Save a model's weights and buffers, in the place of an earlier snapshot of that step.

        With ``wait=False`` they are copied at once, those on a CUDA device in the order of its
        current stream, so that training may go on; a thread hashes and writes the copies. A further
        save first waits until they are written. What goes wrong there is raised, once, by the next
        call of any method but ``repr``, which then does nothing else. An interpreter that exits
        waits for all saves.

        Args:
            model: the model, or its state dict. Tensors may be on any device, of any strides, and
                share memory; each is loaded as a tensor of its own.
            step: optimizer steps completed, >= 0.
            cycle: cycle that ends here, from 0.
            metrics: numbers to keep with the snapshot.
            wait: return when the snapshot is on the disk.

        Returns:
            The snapshot; None with ``wait=False``, as its hash is not known yet.

        Raises:
            TypeError, ValueError: a step or cycle that is not a count, a metric that is not a
                number, or a state dict's entry that is not a tensor, or not one that safetensors
                can hold.
            SnapshotError: the store holds snapshots of a model with other tensors, is damaged, or
                is in use by another process that writes to it.
            OSError: it cannot be written to; what was saved before is still there.

        Warns:
            FastfreezeWarning: on this object's first save, if snapshots of later steps are in the
                directory: they are another run's, or this one has gone back to before them.
        """
        facts = facts_of(step, cycle, metrics)
        state, signature = checked_to_save(model)
        self.flush()
        self._begin(signature, step)
        if wait:
            return self._write(((n, copy_of(t, _CPU)) for n, t in state.items()), signature, facts)
        copies = [(name, copy_of(t, _CPU, wait=False)) for name, t in state.items()]
        devices = {t.device for t in state.values() if t.is_cuda}
        ready = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._background.submit(partial(self._write, copies, signature, facts, ready))
        return None

    def flush(self) -> None:
        """Wait for what ``save(wait=False)`` has begun.

        Raises:
            OSError, SnapshotError: a save failed; as :meth:`save`, and not raised yet.
        """
        self._background.flush()

    def load(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The state dict of a snapshot, on the CPU, its entries in the first snapshot's order.

        Raises:
            SnapshotError: the snapshot is not in the store, or a file of it is missing or damaged.
        """
        self.flush()
        while True:
            before = self._stamp()
            try:
                return self._load(self._read(), snapshot)
            except SnapshotError:
                if self._stamp() == before:  # else it may have been removed meanwhile
                    raise

    @property
    def bytes_on_disk(self) -> int:
        """Size of the store's files."""
        self.flush()
        return sum(map(_size, [*tensor_files(self.directory), self.directory / _MANIFEST]))

    def _held(self) -> Sequence[Entry]:
        self.flush()
        return self._read().entries

    def _key(self, snapshot: Snapshot) -> Hashable:
        return snapshot.step, snapshot.sha256

    def _begin(self, signature: Signature, step: int) -> None:
        """See that a save is possible; warn once of later steps, which this run has not made."""
        with self._writing(signature) as manifest:
            steps = [] if self._has_begun else [e.snapshot.step for e in manifest.entries]
            self._has_begun = True
        if later := [str(other) for other in steps if other > step]:
            warn(
                f"{self.directory} holds snapshots of later steps ({some(later)}) than step {step},"
                " which this run begins with: an ensemble would mix them with this run's. Take"
                " another directory, or remove them by store.remove, or all, before the training,"
                " by store.prune(keep=[])"
            )

    def _load(self, manifest: Manifest, snapshot: Snapshot) -> dict[str, Tensor]:
        hashes = self._find(manifest.entries, snapshot)
        state: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for (name, spec), h in zip(manifest.signature.items(), hashes, strict=True):
            if h in found:
                state[name] = found[h].clone()
            else:
                state[name] = found[h] = read_tensor(self.directory, h, name, spec)
        return state

    @contextmanager
    def _writing(self, signature: Signature | None = None) -> Iterator[Manifest]:
        """The manifest, of this signature if one is given; nobody else changes it meanwhile."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(self.directory / _LOCK)
        except BlockingIOError as error:
            raise SnapshotError(
                f"{self.directory} is in use by another process, and one at a time may write to it:"
                " take another directory, or wait until that process ends"
            ) from error
        me = threading.get_ident()
        if self._lock.owner == me:
            raise SnapshotError(
                f"{self.directory} is being written to by this very thread, as where a signal's "
                "handler saves in the middle of a save: let it set a flag for the training loop"
            )
        with self._lock.mutex:
            self._lock.owner = me
            try:
                manifest = self._read()
                if signature is not None and manifest.entries:
                    label = f"the model to be saved in {self}"
                    check_signature(label, signature, manifest.signature)
                yield manifest
            finally:
                self._lock.owner = None

    def _write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        signature: Signature,
        facts: Snapshot,
        ready: Iterable[torch.cuda.Event] = (),
    ) -> Snapshot:
        """Save tensors that nobody else writes to, once all of ``ready`` has happened.

        It keeps none in memory that is stored already, and writes damaged files anew.
        """
        for event in ready:
            event.synchronize()
        with self._writing(signature) as manifest:
            if manifest.entries:
                signature = manifest.signature
            hashes: dict[str, str] = {}
            new: dict[str, Tensor] = {}
            stored = set(manifest.hashes)
            for name, tensor in tensors:
                h = hashes[name] = content_hash(tensor)
                if not (h in stored and is_intact(self.directory, h, name, signature[name])):
                    new[h] = tensor
            row = tuple(hashes[name] for name in signature)
            entry = Entry(replace(facts, sha256=state_hash(signature, row)), row)
            others = [e for e in manifest.entries if e.snapshot.step != facts.step]
            entries = tuple(sorted([*others, entry], key=lambda e: e.snapshot.step))
            if not (self.directory / _MANIFEST).exists():  # tensors alone would have lost it
                write_atomic(self.directory / _MANIFEST, manifest_bytes(manifest))
            self._remove_leftovers(manifest)  # to make room
            try:
                write_tensors(self.directory, new)
            except BaseException:
                self._remove_leftovers(manifest)
                raise
            self._commit(Manifest(signature, entries))
            return entry.snapshot

    def _discard(self, gone: set[Hashable]) -> None:
        with self._writing() as manifest:
            entries = tuple(e for e in manifest.entries if self._key(e.snapshot) not in gone)
            self._commit(replace(manifest, entries=entries))

    def _commit(self, manifest: Manifest) -> None:
        """Replace the manifest, then remove the tensors that the new one does not name."""
        write_atomic(self.directory / _MANIFEST, manifest_bytes(manifest))
        self._remove_leftovers(manifest)

    def _remove_leftovers(self, manifest: Manifest) -> None:
        """Remove tensors that the manifest does not name, and files half written."""
        keep = {tensor_path(self.directory, h) for h in manifest.hashes}
        for path in tensor_files(self.directory):
            if path not in keep:
                path.unlink()
        remove_temporaries(self.directory)

    def _stamp(self) -> tuple[int, int] | None:
        """Numbers that change when the manifest is replaced; None if there is none."""
        try:
            found = (self.directory / _MANIFEST).lstat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> Manifest:
        path = self.directory / _MANIFEST
        try:
            return parse_manifest(read_file(path))
        except FileNotFoundError:
            if not tensor_files(self.directory):
                return Manifest({})
            if path.exists():  # a first save has begun meanwhile
                return self._read()
            raise SnapshotError(f"{path} is missing, though there are snapshots") from None
        except NotADirectoryError as error:
            raise SnapshotError(f"{self.directory} must be a directory: {error}") from error
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"{path} is not a manifest of snapshots: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # removed meanwhile
        return 0
