"""Files are written whole or not at all, no link is followed, a lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import fastfreeze.files as files_module
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.files import append, lock_file, open_file, remove_temporaries, write_atomic
from tests.killed import alive, killed


@contextmanager
def files_of_at_most(size):
    """What a full disk does: a write ends in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["x" * 255, "a\nb", os.fsdecode(b"\xff"), ".fastfreeze-.tmp"])
def test_a_file_of_any_name_is_replaced(tmp_path, name):
    for content in (b"old", b"", bytes(10**6)):
        write_atomic(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_permissions_are_those_of_an_ordinary_open_or_of_the_old_file(tmp_path):
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        write_atomic(path, b"x")
        append(tmp_path / "lines", b"x\n")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o7777 for p in tmp_path.iterdir()] == [0o640, 0o640]
    path.chmod(0o755)
    write_atomic(path, b"y")
    assert path.stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_what_a_link_leads_to_is_left_alone(tmp_path, link):
    outside, path = tmp_path / "precious", tmp_path / "file"
    outside.write_bytes(b"precious")
    link(path, outside)
    write_atomic(path, b"new")
    assert (outside.read_bytes(), path.read_bytes()) == (b"precious", b"new")
    assert not path.is_symlink()


def test_a_link_in_the_place_of_the_temporary_file(tmp_path, monkeypatch):
    """Though nobody can foresee its name."""
    monkeypatch.setattr(files_module.secrets, "token_hex", lambda n: "0" * 2 * n)
    outside, link = tmp_path / "precious", tmp_path / f".fastfreeze-{'0' * 16}.tmp"
    outside.write_bytes(b"precious")
    link.symlink_to(outside)
    with pytest.raises(FileExistsError, match="file'"):
        write_atomic(tmp_path / "file", b"new")
    assert outside.read_bytes() == b"precious"
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["missing/file", "plain/file", "directory", "x" * 256])
def test_a_failure_names_the_file_and_leaves_nothing(tmp_path, name):
    (tmp_path / "plain").touch()
    (tmp_path / "directory").mkdir()
    path, before = tmp_path / name, sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"\[Errno \d+\]") as error:
        write_atomic(path, b"new")
    assert error.value.filename == str(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with files_of_at_most(1000), pytest.raises(OSError, match=f"{path}") as error:
        write_atomic(path, bytes(10_000))
    assert error.value.errno == errno.EFBIG
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_what_killed_writers_leave_is_removed_and_nothing_else(tmp_path):
    temporaries = [tmp_path / f".fastfreeze-{c * 16}.tmp" for c in "0af"]
    others = [tmp_path / ".fastfreeze-0.tmp", tmp_path / "x.tmp", temporaries[2]]
    outside = tmp_path / "outside"
    for path in (temporaries[0], *others[:2], outside):
        path.touch()
    temporaries[1].symlink_to(outside)
    temporaries[2].mkdir()
    remove_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*others, outside])


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append(path, b"first\n")
    with files_of_at_most(1000), pytest.raises(OSError, match=r"\[Errno 27\]"):
        append(path, b"x" * 2000 + b"\n")
    append(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


ODD = {
    "link": (lambda p, outside: p.symlink_to(outside), "symbolic link, which might lead"),
    "broken link": (lambda p, outside: p.symlink_to("nowhere"), "symbolic link, which might lead"),
    "directory": (lambda p, outside: p.mkdir(), "not a file"),
    "pipe": (lambda p, outside: os.mkfifo(p), "not a file"),
    "absent": (lambda p, outside: None, "No such file"),
}


@pytest.mark.parametrize(("make", "match"), ODD.values(), ids=ODD)
def test_what_is_no_file_is_neither_read_nor_added_to(tmp_path, make, match):
    path, outside = tmp_path / "file", tmp_path / "precious"
    outside.write_bytes(b"precious")
    make(path, outside)
    with pytest.raises(OSError, match=match) as error:
        open_file(path)
    assert error.value.filename == str(path)
    if match != "No such file":
        with pytest.raises(OSError, match=str(path)):
            append(path, b"x\n")
    assert outside.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def holds(path, ready):
    lock = lock_file(path)
    ready()
    time.sleep(60)
    del lock


def is_refused(path, ready):
    with pytest.raises(BlockingIOError):
        lock_file(path)
    ready()
    time.sleep(60)


def free(path):
    """Whether another process can take the lock."""
    try:
        killed(holds, path)
    except AssertionError:
        return False
    return True


def test_one_process_holds_a_lock_for_as_long_as_it_is_referred_to(tmp_path):
    path = tmp_path / "lock"
    first = lock_file(path)
    assert lock_file(tmp_path / "." / "lock") is first
    assert lock_file(tmp_path / "other") is not first
    assert not free(path)
    second = lock_file(path)
    del first
    gc.collect()
    path.read_bytes()  # that a file is closed unlocks some kinds of lock
    assert not free(path)
    del second
    gc.collect()
    assert free(path)


def test_a_lock_ends_with_its_process_and_no_fork_has_it(tmp_path):
    path = tmp_path / "lock"
    with alive(holds, path), pytest.raises(BlockingIOError):
        lock_file(path)
    lock = lock_file(path)
    with ExitStack() as stack:
        with lock.mutex:  # as if another thread were writing
            stack.enter_context(alive(is_refused, path))
        del lock
        gc.collect()
        assert free(path)  # though the child is still there


def test_a_lock_file_that_was_replaced_is_another_lock_and_no_link_is_one(tmp_path):
    path, link = tmp_path / "lock", tmp_path / "link"
    first = lock_file(path)
    path.unlink()
    assert lock_file(path) is not first
    link.symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="link'"):
        lock_file(link)
    assert not (tmp_path / "made").exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(FastfreezeWarning, match=r"lock cannot be locked \(Function not impl"):
        lock = lock_file(tmp_path / "lock")
    assert lock_file(tmp_path / "lock") is lock
