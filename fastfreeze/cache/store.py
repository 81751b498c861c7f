"""Rows by key, in memory or in files, up to a number of bytes.

A store is a row of records to which more are only added, and which goes as a whole. A record comes
with its key, a digest, and a checksum of it all: a process may be killed at any moment, and files
may be cut short or altered; a row is then whole or it is not there.

Files are read and written, not mapped into memory: to touch what is cut off would end the process.
They are opened for each batch: a cache may have any number of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import weakref
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfreeze.files import lock_file
from fastfreeze.trimming.bits import hash_rows

_VERSION = 5
_WORD, _STAMP = 8, 3  # bytes; words: the key of a row, its digest, its checksum
_HEADER = 32
_LOCK = "lock"
_STORE = re.compile(r"[0-9a-f]{32}\.rows")

Column = tuple[torch.dtype, int]  # dtype and elements of a row
_Room = Callable[[int], int]


class Stores:
    """Stores by name that share a number of bytes, and perhaps a directory, one process at a time.

    The directory is locked until ``close()``, or the process ends in whatever way; processes that
    it has forked do not hold the lock.

    Args:
        max_bytes: what they may hold together. Files of earlier processes that are not in use make
            room when it is needed, those first that were used least recently.
        path: made if it is not there; None for memory.

    Raises:
        RuntimeError: the directory is in use.
        OSError: it cannot be made.
    """

    def __init__(self, max_bytes: int, path: Path | None = None) -> None:
        self._max_bytes, self._path = max_bytes, None if path is None else path.resolve()
        self._open: dict[str, RowStore] = {}
        self._unlock: Callable[[], object] = lambda: None
        if path is None or self._path is None:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(self._path / _LOCK)
        except BlockingIOError as error:
            raise RuntimeError(f"{path} is in use by another process") from error
        if not lock.mutex.acquire(blocking=False):
            raise RuntimeError(f"{path} is in use by another cache of this process")
        # It holds the lock, which would else be let go of.
        self._unlock = weakref.finalize(self, lambda lock: lock.mutex.release(), lock)

    def open(self, name: str, column: Column) -> RowStore:
        """The store ``name``, 32 hexadecimal digits, with what an earlier process has left there.

        Raises:
            OSError: its file cannot be made.
        """
        if self._path is None:
            return self._open.setdefault(name, RowStore(column, self.room))
        store = self._open[name] = FileStore(column, self.room, self._path / f"{name}.rows")
        store.take_over()
        return store

    def drop(self, name: str) -> None:
        """Delete a store that is open."""
        self._open.pop(name)
        if self._path is not None:
            with suppress(OSError):  # it is of no use, but does no harm
                (self._path / f"{name}.rows").unlink()

    def room(self, wanted: int) -> int:
        """Bytes that are left, ``wanted`` if that is possible without deleting open stores."""
        left = self._max_bytes - sum(store.nbytes for store in self._open.values())
        paths = [] if self._path is None else list(self._path.iterdir())
        names = {f"{name}.rows" for name in self._open}
        unused = [p for p in paths if _STORE.fullmatch(p.name) and p.name not in names]
        others = {p: found for p in unused if stat.S_ISREG((found := p.lstat()).st_mode)}
        left -= sum(found.st_size for found in others.values())
        for path in sorted(others, key=lambda path: others[path].st_mtime):
            if left >= wanted:
                break
            path.unlink()
            left += others[path].st_size
        return max(left, 0)

    def close(self) -> None:
        """Let go of memory and files; the files stay."""
        self._open.clear()
        self._unlock()


class RowStore:
    """Rows by key, in memory.

    Args:
        column: the dtype and the number of elements, >= 1, of a row.
        room: tells how many bytes may be added, and makes room for so many.
    """

    def __init__(self, column: Column, room: _Room) -> None:
        self._column, self._room = column, room
        self.row_bytes = _WORD * _STAMP + column[0].itemsize * column[1]
        self._slots: dict[int, int] = {}
        self._digests = array("q")
        self._records: list[Any] = []  # bytes of each

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken up."""
        return len(self._digests) * self.row_bytes

    def find(self, keys: Sequence[int]) -> list[int]:
        """The slot of each key; -1 where there is no row."""
        return [self._slots.get(key, -1) for key in keys]

    def digest(self, slot: int) -> int:
        """What came with a row."""
        return self._digests[slot]

    def was_found(self, slot: int) -> bool:
        """Whether a row is left from an earlier process."""
        return False

    def get(self, slots: Sequence[int], pinned: bool = False) -> Tensor | None:
        """Copies of rows, ``[n, numel]``; in pinned memory, or not.

        None if a file was cut short or altered; the rows that this has cost are gone.
        """
        dtype, numel = self._column
        stamps = torch.empty(len(slots), _STAMP, dtype=torch.int64, device="cpu")
        rows = torch.empty(len(slots), numel, dtype=dtype, device="cpu", pin_memory=pinned)
        whole = self._read(slots, stamps, rows)
        if all(whole):
            return rows
        gone = {slot for slot, good in zip(slots, whole, strict=True) if not good}
        self.forget([key for key, slot in self._slots.items() if slot in gone])
        return None

    def add(self, keys: Sequence[int], digests: Sequence[int], rows: Tensor) -> int:
        """Add rows whose keys are not there yet, as far as there is room.

        Args:
            keys: of each row, >= 0.
            digests: 64-bit integers, of whatever meaning.
            rows: ``[n, numel]``, on any device.

        Returns:
            How many were added.
        """
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._slots}
        chosen = sorted(first.values())
        chosen = chosen[: self._room(len(chosen) * self.row_bytes) // self.row_bytes]
        if not chosen:
            return 0
        rows = (rows if len(chosen) == len(keys) else rows[chosen]).cpu().contiguous()
        stamps = torch.tensor([[keys[i], digests[i], 0] for i in chosen], device="cpu")
        stamps[:, -1] = _checksums(stamps, rows)
        data = torch.cat([stamps.view(torch.uint8), rows.view(torch.uint8)], 1)
        start = len(self._digests)
        for i in chosen[: self._write(data.numpy(), start)]:
            self._slots[keys[i]] = len(self._digests)
            self._digests.append(digests[i])
        return len(self._digests) - start

    def forget(self, keys: Collection[int]) -> None:
        """Have no rows of these keys any more; their bytes stay taken up."""
        for key in keys:
            self._slots.pop(key, None)

    def _read(self, slots: Sequence[int], stamps: Tensor, rows: Tensor) -> list[bool]:
        """Copy records, each into a row of both; whether they were whole."""
        for row, slot in zip(rows.view(torch.uint8).numpy(), slots, strict=True):
            row[:] = self._records[slot][_WORD * _STAMP :]
        return [True] * len(slots)

    def _write(self, data: Any, start: int) -> int:
        """Add records, ``[n, row_bytes]``, behind so many; how many were added."""
        del self._records[start:]
        self._records.extend(data)
        return len(data)


class FileStore(RowStore):
    """The same in a file. What it holds in another format, or of another column, is deleted.

    Raises:
        OSError: it cannot be made, here and in all methods.
    """

    def __init__(self, column: Column, room: _Room, path: Path) -> None:
        super().__init__(column, room)
        self._path, self._num_found = path, 0
        text = f"fastfreeze rows {_VERSION}\n{column[0]} {column[1]}\n"
        header = hashlib.blake2b(text.encode(), digest_size=_HEADER).digest()
        with suppress(FileNotFoundError):
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # it is elsewhere, too
                path.unlink()
        with _opened(path) as fd:
            if os.pread(fd, _HEADER, 0) != header:
                os.ftruncate(fd, 0)
                os.pwrite(fd, header, 0)

    def take_over(self) -> None:
        """Have what earlier processes have left, as far as there is room; the rest is cut off."""
        size = self._path.stat().st_size - _HEADER
        self._num_found = min(self._room(size), size) // self.row_bytes
        with _opened(self._path) as fd:
            os.ftruncate(fd, self._place(self._num_found))
            os.utime(fd)
            for slot in range(self._num_found):
                stamp = array("q", os.pread(fd, _WORD * _STAMP, self._place(slot)))
                if stamp[2]:
                    self._slots[stamp[0]] = slot
                self._digests.append(stamp[1])

    def was_found(self, slot: int) -> bool:
        return slot < self._num_found

    def _read(self, slots: Sequence[int], stamps: Tensor, rows: Tensor) -> list[bool]:
        buffers = [t.view(torch.uint8).numpy() for t in (stamps, rows)]
        with _opened(self._path) as fd:
            lengths = [
                os.preadv(fd, [b[i] for b in buffers], self._place(slot))
                for i, slot in enumerate(slots)
            ]
        same = (_checksums(stamps, rows) == stamps[:, -1]).tolist()  # it may have been altered
        return [n == self.row_bytes and s for n, s in zip(lengths, same, strict=True)]

    def _write(self, data: Any, start: int) -> int:
        left, written, place = data.reshape(-1).data, 0, self._place(start)
        with _opened(self._path) as fd, suppress(OSError):  # the device is full
            while written < len(left):
                written += os.pwrite(fd, left[written:], place + written)
        return written // self.row_bytes

    def _place(self, slot: int) -> int:
        return _HEADER + slot * self.row_bytes


def _checksums(stamps: Tensor, rows: Tensor) -> Tensor:
    """Of rows and what else their stamps say; never 0, which a hole in a file holds."""
    return hash_rows(stamps[:, :-1], rows) | 1


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file to read and write, which is made if it is not there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
