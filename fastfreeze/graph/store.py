"""Rows by key, in memory or in files, within a budget of bytes.

A store is a few arrays, one for each column and one for the *stamps*: the key of each row, a digest
that came with it, and a checksum of it all. They are dense: where a row goes, the last one takes
its place. A row is written before its stamp, and is whole if its checksum says so: a process may be
killed at any moment, and files may be cut short or altered; a row is then there or it is not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastfreeze.graph.rows import hash_rows

_VERSION = 1
_KEY, _DIGEST, _CHECKSUM = range(3)
_STAMP_BYTES = 24
_CHUNK_BYTES = 16 * 2**20  # arrays grow by so much at least
_OWN, _UNREAD, _READ = range(3)  # written by this process; or found, and its checksum is ...
_LOCK, _HEADER = "lock", "header"
_STORE = re.compile("[0-9a-f]{32}")

Column = tuple[torch.dtype, int]  # dtype and elements of a row


class Budget:
    """Bytes that stores share.

    Args:
        max_bytes: what they may hold together.
        directory: whose stores of earlier processes make room when it is needed.
    """

    def __init__(self, max_bytes: int, directory: StoreDirectory | None = None) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self._directory = directory
        self._stores: weakref.WeakSet[RowStore] = weakref.WeakSet()

    def register(self, store: RowStore) -> None:
        """From now on ``store`` gives back what it does not need when another one needs it."""
        self._stores.add(store)

    def left(self) -> int:
        """Bytes that there is room for."""
        return max(self._total() - self.used, 0)

    def free(self, wanted: int, asking: RowStore) -> None:
        """Have so many bytes left if that is possible without removing rows of this process."""
        if self.left() < wanted:
            for store in set(self._stores) - {asking}:
                store.shrink()
        while self.left() < wanted and self._directory is not None:
            if not self._directory.remove_oldest():
                break

    def _total(self) -> int:
        return self.max_bytes - (self._directory.other_bytes() if self._directory else 0)


class StoreDirectory:
    """A directory of stores that one process uses at a time.

    It is locked until :meth:`close`, or the process ends in whatever way; processes that it has
    forked do not hold the lock.

    Args:
        path: made if it is not there.

    Raises:
        RuntimeError: it is in use.
    """

    _locked: dict[Path, int] = {}  # noqa: RUF012  # closing a lock's file twice would unlock it

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        if StoreDirectory._locked.get(self.path) == os.getpid():
            raise RuntimeError(f"{path} is in use by another cache of this process")
        fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise RuntimeError(f"{path} is in use by another process") from error
        StoreDirectory._locked[self.path] = os.getpid()
        self._unlock = weakref.finalize(self, _unlock, self.path, fd)
        self._opened: set[str] = set()
        self._others: dict[str, int] | None = None

    def open(self, name: str) -> Path:
        """Where the store ``name``, 32 hexadecimal digits, is or will be."""
        assert _STORE.fullmatch(name)
        self._opened.add(name)
        self._others = None
        return self.path / name

    def remove(self, name: str) -> None:
        """Delete a store's files."""
        (self.path / name / _HEADER).unlink(missing_ok=True)  # what is left of it is not a store
        shutil.rmtree(self.path / name, ignore_errors=True)
        self._opened.discard(name)
        self._others = None

    def other_bytes(self) -> int:
        """Size of the stores that this process has not opened."""
        return sum(self._other_stores().values())

    def remove_oldest(self) -> bool:
        """Delete the one of them that was written to least recently; False if there is none."""
        others = self._other_stores()
        if not others:
            return False
        oldest = min(others, key=lambda name: _last_write(self.path / name))
        self.remove(oldest)
        return oldest not in self._other_stores()

    def close(self) -> None:
        self._unlock()

    def _other_stores(self) -> dict[str, int]:
        if self._others is None:
            found = [p for p in self.path.iterdir() if _STORE.fullmatch(p.name)]
            found = [p for p in found if p.is_dir() and p.name not in self._opened]
            self._others = {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in found}
        return self._others


def _last_write(path: Path) -> float:
    return max((file.stat().st_mtime for file in path.iterdir()), default=0.0)


def _unlock(path: Path, fd: int) -> None:
    if StoreDirectory._locked.get(path) == os.getpid():
        del StoreDirectory._locked[path]
    os.close(fd)


class RowStore:
    """Rows of a few columns, by key.

    Args:
        columns: the dtype and the number of elements, >= 1, of a row of each column.
        budget: holds the bytes of all stores down.
        path: a directory that keeps the rows; None for memory. What it holds of rows of other
            columns, or in another format, is deleted.

    Raises:
        OSError: there is a ``path``, and it cannot be written to.
    """

    def __init__(self, columns: Sequence[Column], budget: Budget, path: Path | None = None) -> None:
        self.row_bytes = _STAMP_BYTES + sum(d.itemsize * numel for d, numel in columns)
        self._budget, self._lasts = budget, path is not None
        if path is not None:
            _prepare(path, columns)
        files = [None if path is None else path / f"{i}.rows" for i in range(len(columns) + 1)]
        self._stamps = _Array(torch.int64, 3, files[0])
        self._columns = [_Array(*c, file) for c, file in zip(columns, files[1:], strict=True)]
        self._slots: dict[int, int] = {}
        self._state = bytearray()
        self._capacity = 0
        self._find_rows()
        budget.register(self)

    def __len__(self) -> int:
        return len(self._state)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken up."""
        return self._capacity * self.row_bytes

    def find(self, keys: Sequence[int]) -> list[int]:
        """The slot of each key; -1 where there is no row, or it was damaged and is now gone."""
        slots = [self._slots.get(key, -1) for key in keys]
        unread = sorted({s for s in slots if s >= 0 and self._state[s] == _UNREAD})
        if not unread:
            return slots
        expected = self._checksums(torch.tensor(unread))
        found = self._stamps.rows[unread, _CHECKSUM]
        for slot in unread:
            self._state[slot] = _READ
        damaged = [
            s for s, same in zip(unread, (expected == found).tolist(), strict=True) if not same
        ]
        if not damaged:
            return slots
        self.discard(damaged)
        return [self._slots.get(key, -1) for key in keys]

    def found_here(self, slots: Sequence[int]) -> list[bool]:
        """Whether rows are left from an earlier process."""
        return [self._state[slot] != _OWN for slot in slots]

    def keys(self, limit: int) -> list[int]:
        """Keys of up to ``limit`` rows, the latest."""
        first = max(len(self) - limit, 0)
        keys: list[int] = self._stamps.rows[first : len(self), _KEY].tolist() if len(self) else []
        return keys

    def digests(self, slots: Sequence[int]) -> Tensor:
        """int64 ``[n]``: what came with each row."""
        return self._stamps.rows[list(slots), _DIGEST]

    def get(self, slots: Sequence[int]) -> list[Tensor]:
        """Copies of rows, ``[n, numel]`` of each column."""
        index = torch.tensor(slots, dtype=torch.int64)
        return [column.rows.index_select(0, index).view(column.dtype) for column in self._columns]

    def add(self, keys: Sequence[int], digests: Tensor, values: Sequence[Tensor]) -> int:
        """Add rows whose keys are not there yet, as far as there is room.

        Args:
            keys: of each row, >= 0.
            digests: int64 ``[n]`` on the CPU, of whatever meaning.
            values: ``[n, numel]`` of each column, on any device.

        Returns:
            How many were added.
        """
        first_rows = {
            key: i for i, key in reversed(list(enumerate(keys))) if key not in self._slots
        }
        chosen = sorted(first_rows.values())
        start = len(self)
        chosen = chosen[: max(self._reserve(start + len(chosen)) - start, 0)]
        if not chosen:
            return 0
        at, index = slice(start, start + len(chosen)), torch.tensor(chosen)
        for column, value in zip(self._columns, values, strict=True):
            rows = (
                value if len(chosen) == len(keys) else value.index_select(0, index.to(value.device))
            )
            column.rows[at] = rows
        self._state.extend(bytes(len(chosen)))
        self._stamps.rows[at, _KEY] = torch.tensor([keys[i] for i in chosen])
        self._stamps.rows[at, _DIGEST] = digests[index]
        self._stamps.rows[at, _CHECKSUM] = self._checksums(at) if self._lasts else 1
        self._slots.update((keys[i], start + n) for n, i in enumerate(chosen))
        return len(chosen)

    def discard(self, slots: Sequence[int]) -> None:
        """Remove rows; others may then have other slots."""
        gone = set(slots)
        for key in self._stamps.rows[sorted(gone), _KEY].tolist() if gone else []:
            self._slots.pop(key, None)
        length = len(self) - len(gone)
        holes = sorted(s for s in gone if s < length)
        movers = [s for s in range(length, len(self)) if s not in gone]
        self._move(movers, holes)
        if gone:
            self._stamps.rows[length : len(self), _CHECKSUM] = 0
        del self._state[length:]
        if (self._capacity - length) * self.row_bytes > 3 * _CHUNK_BYTES:
            self._resize(length + _CHUNK_BYTES // self.row_bytes)

    def shrink(self) -> None:
        """Give back what no row needs."""
        if self._capacity > len(self):
            self._resize(len(self))

    def close(self) -> None:
        """Let go of the memory and the files, which stay as they are; no call may follow."""
        self._budget.used -= self.nbytes
        self._capacity = 0
        self._slots.clear()
        self._state.clear()
        for array in self._all():
            array.close()

    def _move(self, movers: list[int], holes: list[int]) -> None:
        if not movers:
            return
        source, target = torch.tensor(movers), torch.tensor(holes)
        self._stamps.rows[target, _CHECKSUM] = 0
        for array in (*self._columns, self._stamps):
            array.rows.index_copy_(0, target, array.rows.index_select(0, source))
        keys = self._stamps.rows[target, _KEY].tolist()
        for key, mover, hole in zip(keys, movers, holes, strict=True):
            self._state[hole] = self._state[mover]
            if self._slots.get(key) == mover:  # not what an interrupted call has left
                self._slots[key] = hole

    def _checksums(self, at: slice | Tensor) -> Tensor:
        """Of rows as they are now; never 0, which marks a slot as empty."""
        total = hash_rows(self._stamps.rows[at][:, :_CHECKSUM])
        for column in self._columns:
            total = total * 3 + hash_rows(column.rows[at])
        return total | 1

    def _all(self) -> tuple[_Array, ...]:
        return (self._stamps, *self._columns)

    def _reserve(self, length: int) -> int:
        """Grow to hold ``length`` rows and some more, if possible; returns the capacity."""
        if length > self._capacity:
            need = length - self._capacity
            step = max(need, self._capacity // 4, _CHUNK_BYTES // self.row_bytes)
            self._budget.free(need * self.row_bytes, self)
            self._resize(self._capacity + min(step, self._budget.left() // self.row_bytes))
        return self._capacity

    def _resize(self, capacity: int) -> None:
        before = self._capacity
        try:
            for array in self._all():
                array.resize(capacity)
        except OSError:  # no space on the device: no more is added
            for array in self._all():
                array.resize(before)
            return
        self._capacity = capacity
        self._budget.used += (capacity - before) * self.row_bytes

    def _find_rows(self) -> None:
        """Take over what earlier processes have left, as far as the budget goes."""
        found = min(array.capacity for array in self._all())
        self._budget.free(found * self.row_bytes, self)
        kept = min(found, self._budget.left() // self.row_bytes)
        for array in self._all():
            array.resize(kept)
        self._capacity = kept
        self._budget.used += self.nbytes
        full = (
            (self._stamps.rows[:kept, _CHECKSUM] != 0).nonzero().flatten().tolist() if kept else []
        )
        length = full[-1] + 1 if full else 0
        self._state = bytearray([_UNREAD]) * length
        whole = set(full)
        superfluous = [s for s in range(length) if s not in whole]
        keys = self._stamps.rows[:length, _KEY].tolist() if length else []
        for slot in full:
            if self._slots.setdefault(keys[slot], slot) != slot:
                superfluous.append(slot)
        for slot in superfluous:  # a removal that was not finished
            self._stamps.rows[slot, _KEY] = -1
        self.discard(superfluous)


class _Array:
    """``[capacity, numel]`` of a dtype, in mapped memory or a mapped file; of changing length.

    Attributes:
        rows: the array, as bytes where the dtype is bool, whose copies may differ in their bits.
    """

    def __init__(self, dtype: torch.dtype, numel: int, path: Path | None) -> None:
        self.dtype, self._numel = dtype, numel
        self._held = torch.uint8 if dtype == torch.bool else dtype
        self._width = dtype.itemsize * numel
        if path is None:
            self._fd = os.memfd_create("fastfreeze")
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.close = weakref.finalize(self, os.close, self._fd)
        self._map: mmap.mmap | None = None
        self.capacity = os.fstat(self._fd).st_size // self._width
        self.rows = torch.empty(0, numel, dtype=self._held)

    def resize(self, capacity: int) -> None:
        """Have ``capacity`` rows; earlier views of :attr:`rows` are void.

        Raises:
            OSError: there is no space.
        """
        size, before = capacity * self._width, os.fstat(self._fd).st_size
        if size > before:  # not only promised: a write to a full disk would kill the process
            os.posix_fallocate(self._fd, before, size - before)
        self.rows = torch.empty(0, self._numel, dtype=self._held)
        self._map = None
        os.ftruncate(self._fd, size)
        self.capacity = capacity
        if capacity:
            self._map = mmap.mmap(self._fd, size)
            self.rows = torch.frombuffer(self._map, dtype=self._held).view(capacity, self._numel)


def _prepare(path: Path, columns: Sequence[Column]) -> None:
    """Make ``path`` the directory of a store of these columns."""
    header = f"fastfreeze rows {_VERSION}\n" + "".join(f"{d} {numel}\n" for d, numel in columns)
    try:
        fits = (path / _HEADER).read_text() == header
    except (OSError, ValueError):
        fits = False
    if not fits:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        temporary = path / f"{_HEADER}.tmp"
        temporary.write_text(header)
        temporary.replace(path / _HEADER)
