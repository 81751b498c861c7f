"""Files that are written whole, lines that are added to one, and locks.

No function here follows a symbolic link in a file's place: in a directory that comes out of an
archive, or that others write to, it may lead anywhere.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import threading
import weakref
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from fastfreeze.errors import warn

_MODE = 0o666  # less the umask
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # the last: to open a pipe would wait
_TEMPORARY = re.compile(r"\.fastfreeze-[0-9a-f]{16}\.tmp")
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # of a file system that has none


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file such that at any moment either the old one or all of the new one is there.

    When it returns, the file is on the disk, with the permissions of the old one. A link is
    replaced, not what it leads to. A killed process may leave a file beside it that
    :func:`remove_temporaries` knows.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    temporary = path.parent / f".fastfreeze-{secrets.token_hex(8)}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, _MODE)
        try:
            with os.fdopen(fd, "wb") as file:
                _copy_permissions(path, fd)
                file.write(content)
                file.flush()
                os.fsync(fd)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the file that was named
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def append(path: Path, line: bytes) -> None:
    """Add a line to a file, all of it or nothing; a killed process may leave its beginning.

    Raises:
        OSError: it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _FLAGS, _MODE)
    try:
        before, left = os.fstat(fd).st_size, memoryview(line)
        try:
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        except BaseException:
            os.ftruncate(fd, before)
            raise
    finally:
        os.close(fd)


def open_file(path: Path) -> BufferedReader:
    """A file to read from.

    Raises:
        OSError: it is not there, or no plain file, or may not be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = "a symbolic link, which might lead anywhere, is not followed"
            raise OSError(errno.ELOOP, message, str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(fd, "rb")


def read_file(path: Path) -> bytes:
    """All that a file holds; raises as :func:`open_file`."""
    with open_file(path) as file:
        return file.read()


def remove_temporaries(directory: Path) -> None:
    """Remove files that killed processes left half written; for the one writer of a directory."""
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name) and not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()


class FileLock:
    """A file that no other process can lock; see :func:`lock_file`.

    Attributes:
        mutex: for the threads of this process to take turns.
        owner: the thread whose turn it is, if it says so.
    """

    def __init__(self, fd: int) -> None:
        self.mutex = threading.Lock()
        self.owner: int | None = None
        self.close = weakref.finalize(self, os.close, fd)
        self.close.atexit = False  # threads may still be writing


_held: weakref.WeakValueDictionary[tuple[int, int], FileLock] = weakref.WeakValueDictionary()
_registry = threading.Lock()


def lock_file(path: Path) -> FileLock:
    """Lock a file, which is made if it is not there, for this process.

    All that ask in one process get the same lock. It holds until none of them refers to it, or the
    process ends in whatever way. A forked process does not hold it.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be made.

    Warns:
        FastfreezeWarning: its file system has no locks.
    """
    with _registry:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, _MODE)
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino
        held = _held.get(key)
        if held is not None:
            os.close(fd)
            return held
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
            warn(
                f"{path} cannot be locked ({error.strerror}): see that no other process writes to"
                f" {path.parent}"
            )
        lock = _held[key] = FileLock(fd)
        return lock


def _forget_locks() -> None:
    """In a forked child: its copies of open files would hold the locks for its parent."""
    for lock in list(_held.values()):
        lock.close()
    _held.clear()
    _registry.release()


os.register_at_fork(
    before=_registry.acquire, after_in_parent=_registry.release, after_in_child=_forget_locks
)


def _copy_permissions(path: Path, fd: int) -> None:
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            os.fchmod(fd, mode & 0o777)
