"""Rows by key, in memory or in files, within a budget of bytes.

A store is a few arrays, one for each column and one for the *stamps*: the key of each row, a digest
that came with it, and a checksum of it all. They are dense: where a row goes, the last one takes
its place. A row is written before its stamp, and is whole if its checksum says so: a process may be
killed at any moment, and files may be cut short or altered; a row is then there or it is not.

Files are read and written, not mapped into memory: to touch what is cut off would end the process.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import stat
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastfreeze.cache.rows import CannotKeepError, hash_rows
from fastfreeze.files import FileLock, lock_file, read_file, write_atomic

_VERSION = 2
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

    It is locked until ``close()``, or the process ends in whatever way; processes that it has
    forked do not hold the lock.

    Args:
        path: made if it is not there.

    Raises:
        RuntimeError: it is in use.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        try:
            lock = lock_file(self.path / _LOCK)
        except BlockingIOError as error:
            raise RuntimeError(f"{path} is in use by another process") from error
        if not lock.mutex.acquire(blocking=False):
            raise RuntimeError(f"{path} is in use by another cache of this process")
        self.close = weakref.finalize(self, _release, lock)
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
        _remove(self.path / name)
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

    def _other_stores(self) -> dict[str, int]:
        if self._others is None:
            found = [p for p in self.path.iterdir() if _STORE.fullmatch(p.name)]
            found = [p for p in found if _is_directory(p) and p.name not in self._opened]
            self._others = {p.name: sum(f.lstat().st_size for f in p.iterdir()) for p in found}
        return self._others


def _last_write(path: Path) -> float:
    return max((file.lstat().st_mtime for file in path.iterdir()), default=0.0)


def _is_directory(path: Path) -> bool:
    """Not by a symbolic link, through which a deletion would reach other files."""
    return path.is_dir() and not path.is_symlink()


def _release(lock: FileLock) -> None:
    lock.mutex.release()


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
        self._budget = budget
        self._stamps = _Memory(torch.int64, 3)
        self._stamps_file: _File | None = None
        self._columns: Sequence[_Memory | _File]
        if path is None:
            self._columns = [_Memory(*column) for column in columns]
        else:
            _prepare(path, columns)
            self._stamps_file = _File(torch.int64, 3, path / "0.rows")
            self._columns = [_File(*c, path / f"{i}.rows") for i, c in enumerate(columns, 1)]
        self._slots: dict[int, int] = {}
        self._state = bytearray()
        self._capacity = 0
        if self._stamps_file is not None:
            self._find_rows(self._stamps_file)
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
        damaged = self._damaged(unread, [column.read(unread) for column in self._columns])
        for slot in unread:
            self._state[slot] = _READ
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

    def get(self, slots: Sequence[int], pinned: bool = False) -> list[Tensor]:
        """Copies of rows, ``[n, numel]`` of each column; in pinned memory, or not.

        Raises:
            CannotKeepError: a file was cut short or altered since they were found; what it has cost
                is gone.
        """
        values = [column.read(slots, pinned) for column in self._columns]
        if self._stamps_file is not None and (damaged := self._damaged(slots, values)):
            self.discard(damaged)
            raise CannotKeepError(f"{len(damaged)} rows of a file were damaged while it was in use")
        return [v.view(column.dtype) for v, column in zip(values, self._columns, strict=True)]

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
        at, index = range(start, start + len(chosen)), torch.tensor(chosen, device="cpu")
        if len(chosen) < len(keys):
            values = [value.index_select(0, index.to(value.device)) for value in values]
        if self._stamps_file is not None:
            values = [v.to("cpu", c.held) for v, c in zip(values, self._columns, strict=True)]
        for column, value in zip(self._columns, values, strict=True):
            column.write(at, value)
        self._state.extend(bytes(len(chosen)))
        stamps = torch.ones(len(chosen), 3, dtype=torch.int64, device="cpu")
        stamps[:, _KEY] = torch.tensor([keys[i] for i in chosen], device="cpu")
        stamps[:, _DIGEST] = digests[index]
        if self._stamps_file is not None:
            stamps[:, _CHECKSUM] = _checksums(stamps, values)
        self._stamp(at, stamps)
        self._slots.update((keys[i], start + n) for n, i in enumerate(chosen))
        return len(chosen)

    def discard(self, slots: Collection[int]) -> None:
        """Remove rows; others may then have other slots."""
        gone = set(slots)
        for key in self._stamps.rows[sorted(gone), _KEY].tolist() if gone else []:
            self._slots.pop(key, None)
        length = len(self) - len(gone)
        holes = sorted(s for s in gone if s < length)
        movers = [s for s in range(length, len(self)) if s not in gone]
        self._move(movers, holes)
        if gone:
            self._clear(range(length, len(self)))
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
        self._clear(holes)
        for column in self._columns:
            column.write(holes, column.read(movers))
        self._stamp(holes, self._stamps.read(movers))
        keys = self._stamps.rows[holes, _KEY].tolist()
        for key, mover, hole in zip(keys, movers, holes, strict=True):
            self._state[hole] = self._state[mover]
            if self._slots.get(key) == mover:  # not what an interrupted call has left
                self._slots[key] = hole

    def _stamp(self, slots: Sequence[int], stamps: Tensor) -> None:
        self._stamps.write(slots, stamps)
        if self._stamps_file is not None:
            self._stamps_file.write(slots, stamps)

    def _clear(self, slots: Sequence[int]) -> None:
        """Have no row there, for those who find the files."""
        stamps = self._stamps.read(slots)
        stamps[:, _CHECKSUM] = 0
        self._stamp(slots, stamps)

    def _damaged(self, slots: Sequence[int], values: Sequence[Tensor]) -> set[int]:
        """Those of some slots whose rows are not these values."""
        stamps = self._stamps.read(slots)
        same = (_checksums(stamps, values) == stamps[:, _CHECKSUM]).tolist()
        return {slot for slot, whole in zip(slots, same, strict=True) if not whole}

    def _all(self) -> tuple[_Memory | _File, ...]:
        files = () if self._stamps_file is None else (self._stamps_file,)
        return (self._stamps, *files, *self._columns)

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
                with suppress(OSError):  # of a file that was cut short meanwhile
                    array.resize(before)
            return
        self._capacity = capacity
        self._budget.used += (capacity - before) * self.row_bytes

    def _find_rows(self, stamps_file: _File) -> None:
        """Take over what earlier processes have left, as far as the budget goes."""
        found = min(array.capacity for array in self._all() if isinstance(array, _File))
        self._budget.free(found * self.row_bytes, self)
        kept = min(found, self._budget.left() // self.row_bytes)
        for array in self._all():
            array.resize(kept)
        self._capacity = kept
        self._budget.used += self.nbytes
        stamps = stamps_file.read(range(kept))
        self._stamps.write(range(kept), stamps)
        full = (stamps[:, _CHECKSUM] != 0).nonzero().flatten().tolist()
        length = full[-1] + 1 if full else 0
        self._state = bytearray([_UNREAD]) * length
        whole = set(full)
        superfluous = [s for s in range(length) if s not in whole]
        keys = stamps[:, _KEY].tolist()
        for slot in full:
            if self._slots.setdefault(keys[slot], slot) != slot:
                superfluous.append(slot)
        for slot in superfluous:  # a removal that was not finished
            self._stamps.rows[slot, _KEY] = -1
        self.discard(superfluous)


class _Memory:
    """``[capacity, numel]`` of a dtype, in mapped memory; of changing length.

    Attributes:
        held: the dtype that is held: bytes for bool, whose copies may differ in their bits.
        rows: the array.
    """

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self._numel = dtype, numel
        self.held = torch.uint8 if dtype == torch.bool else dtype
        self._width = dtype.itemsize * numel
        self._fd = os.memfd_create("fastfreeze")
        self.close = weakref.finalize(self, os.close, self._fd)
        self._map: mmap.mmap | None = None
        self.rows = torch.empty(0, numel, dtype=self.held, device="cpu")

    def read(self, slots: Sequence[int], pinned: bool = False) -> Tensor:
        """Copies of rows, ``[n, numel]`` of :attr:`held`; in pinned memory, or not."""
        shape = len(slots), self._numel
        copies = torch.empty(shape, dtype=self.held, device="cpu", pin_memory=pinned)
        index = torch.tensor(slots, dtype=torch.int64, device="cpu")
        return torch.index_select(self.rows, 0, index, out=copies)

    def write(self, slots: Sequence[int], values: Tensor) -> None:
        """Replace rows by values on any device; the slots differ."""
        self.rows[_index(slots)] = values

    def resize(self, capacity: int) -> None:
        """Have ``capacity`` rows; earlier views of :attr:`rows` are void.

        Raises:
            OSError: there is no space.
        """
        _set_size(self._fd, capacity * self._width)
        self.rows = torch.empty(0, self._numel, dtype=self.held, device="cpu")
        self._map = None
        if capacity:
            self._map = mmap.mmap(self._fd, capacity * self._width)
            self.rows = torch.frombuffer(self._map, dtype=self.held).view(capacity, self._numel)


class _File:
    """As :class:`_Memory`, in a file that others may cut short or alter at any moment.

    What cannot be read is zero, and what cannot be written is not there: a checksum tells.
    """

    def __init__(self, dtype: torch.dtype, numel: int, path: Path) -> None:
        self.dtype = dtype
        self.held = torch.uint8 if dtype == torch.bool else dtype
        self._width = dtype.itemsize * numel
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o666)
        self.close = weakref.finalize(self, os.close, self._fd)

    @property
    def capacity(self) -> int:
        """Whole rows that the file has room for."""
        return os.fstat(self._fd).st_size // self._width

    def read(self, slots: Sequence[int], pinned: bool = False) -> Tensor:
        """Copies of rows, ``[n, numel]`` of ``held``."""
        shape = len(slots), self._width
        data = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        rows = data.numpy()
        for run in _runs(slots):
            left, at = rows[run].data.cast("B"), slots[run.start] * self._width
            with suppress(OSError):
                while left and (n := os.preadv(self._fd, [left], at)):
                    left, at = left[n:], at + n
            left[:] = bytes(len(left))
        return data.view(self.held)

    def write(self, slots: Sequence[int], values: Tensor) -> None:
        """Replace rows by values of ``held`` on the CPU; the slots differ."""
        rows = values.contiguous().view(torch.uint8).numpy()
        for run in _runs(slots):
            left, at = rows[run].data.cast("B"), slots[run.start] * self._width
            with suppress(OSError):
                while left:
                    n = os.pwrite(self._fd, left, at)
                    left, at = left[n:], at + n

    def resize(self, capacity: int) -> None:
        """Have room for ``capacity`` rows.

        Raises:
            OSError: there is no space.
        """
        _set_size(self._fd, capacity * self._width)


def _checksums(stamps: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Of rows and what else their stamps say; never 0, which marks a slot as empty."""
    total = hash_rows(stamps[:, :_CHECKSUM])
    for value in values:
        total = total * 3 + hash_rows(value)
    return total | 1


def _index(slots: Sequence[int]) -> slice | Tensor:
    if isinstance(slots, range):
        return slice(slots.start, slots.stop)
    return torch.tensor(slots, dtype=torch.int64, device="cpu")


def _runs(slots: Sequence[int]) -> Iterator[slice]:
    """Positions of slots that follow one another."""
    start = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1:
            yield slice(start, i)
            start = i


def _set_size(fd: int, size: int) -> None:
    before = os.fstat(fd).st_size
    if size > before:  # not only promised, or the disk may be full when it is needed
        os.posix_fallocate(fd, before, size - before)
    os.ftruncate(fd, size)


def _prepare(path: Path, columns: Sequence[Column]) -> None:
    """Make ``path`` the directory of a store of these columns."""
    header = f"fastfreeze rows {_VERSION}\n" + "".join(f"{d} {numel}\n" for d, numel in columns)
    if not _is_store(path, header.encode()):
        _remove(path)
        path.mkdir(parents=True)
        write_atomic(path / _HEADER, header.encode())


def _is_store(path: Path, header: bytes) -> bool:
    """Whether it has this header, and files that nothing else refers to: they are written to."""
    try:
        found = [file.lstat() for file in path.iterdir()]
        own = all(stat.S_ISREG(f.st_mode) and f.st_nlink == 1 for f in found)
        return own and _is_directory(path) and read_file(path / _HEADER) == header
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Delete a store's files, or what is in their place, as far as that is possible."""
    with suppress(OSError):
        if not _is_directory(path):
            path.unlink()
        else:
            (path / _HEADER).unlink(missing_ok=True)  # what is left of it is not a store
            shutil.rmtree(path, ignore_errors=True)
