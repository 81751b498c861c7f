"""Whatever happens to the files of a store, no wrong weights are loaded, and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastfreeze.snapshots.store as store_module
import fastfreeze.snapshots.tensors as tensors_module
from fastfreeze.errors import SnapshotError
from fastfreeze.files import append, write_atomic
from fastfreeze.snapshots import SnapshotStore
from tests.killed import killed
from tests.snapshots.stores import (
    assert_holds,
    assert_same_state,
    bytes_in,
    distinct_bytes,
    file_of,
    files_in,
    filled_store,
    full_disk,
    manifest_of,
    raw_state,
    states,
    steps,
    sticky_chain,
)


def flipped(data, places):
    """With another bit in one of these places."""
    return [data[:at] + bytes([data[at] ^ 1 << at % 7]) + data[at + 1 :] for at in places]


def forged_files(data):
    """With another header in front of the data, or other tensors."""
    place = {"dtype": "F32", "shape": [6, 4]}
    headers = [
        [],
        {"tensor": {**place, "data_offsets": [10**6, 10**6 + 96]}},  # beyond the end
        {name: {**place, "data_offsets": [0, 96]} for name in "ab"},
    ]
    for text in (json.dumps(header).encode() for header in headers):
        yield len(text).to_bytes(8, "little") + text + data[-96:]
    yield b"\xff" * 8 + data[8:]
    for more in ({}, {**safetensors.torch.load(data), "z": torch.ones(1)}):
        yield safetensors.torch.save(more)


def test_a_damaged_or_forged_tensor_is_never_loaded(tmp_path):
    store, (state,) = filled_store(tmp_path, 1)
    (snapshot,), path = store, file_of(tmp_path, state["0.weight"])
    good, loaded = path.read_bytes(), store.load(snapshot)
    header = 8 + int.from_bytes(good[:8], "little")
    cut = [good[:n] for n in (0, 7, len(good) // 2, -1)]
    for bad in (*flipped(good, range(header, len(good), 3)), *cut, *forged_files(good)):
        path.write_bytes(bad)
        with pytest.raises(SnapshotError, match=rf"{path.name} is truncated or altered, at '0\.w"):
            store.load(snapshot)
    assert_same_state(loaded, state)  # not a view of the file
    assert_same_state(store.load(store.save(state, step=10, cycle=0)), state)


def rot(path):
    """Change a tensor in its file, which keeps its size and its header."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:begin] + bytes(b ^ 1 for b in data[begin:]))


def link_out(path):
    path.symlink_to(path.parent.parent / "outside")


def move_out(path):
    """As an archive might bring it: a link out of the store."""
    path.rename(path.parent.parent / "outside")
    link_out(path)


LOSSES = {"gone": Path.unlink, "cut": lambda p: os.truncate(p, 99), "rotten": rot, "link": move_out}


@pytest.mark.parametrize("damage", LOSSES.values(), ids=LOSSES)
def test_a_lost_tensor_is_written_again(tmp_path, damage):
    """When it is saved again. Until then all that hold it are refused, and can be removed."""
    chain, directory = sticky_chain(3), tmp_path / "store"
    store = SnapshotStore(directory)
    first, second = (store.save(state, step=i, cycle=i) for i, state in enumerate(chain[:2]))
    damage(file_of(directory, chain[0]["0.weight"]))  # which all have in common
    refused = r"tensor-\w+\.safe.* (cannot be|is truncated).*'0.w"
    for snapshot in (first, second):
        with pytest.raises(SnapshotError, match=refused):
            store.load(snapshot)
    store.remove(first)
    assert tuple(store) == (second,)
    store.save(chain[2], step=2, cycle=2)
    assert_holds(store, chain[1:])
    store.remove(second)
    assert bytes_in(directory) == distinct_bytes(chain[2])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store whose snapshots share tensors, and what is in it, by step."""
    directory = tmp_path_factory.mktemp("template")
    store, chain = SnapshotStore(directory), sticky_chain(3)
    for i, state in enumerate(chain):
        store.save(state, step=i, cycle=i, metrics={"loss": 0.5 - i})
    return directory, chain


def splice(files, i, at, count, piece):
    old = files[i].read_bytes()
    at %= len(old) + 1
    files[i].write_bytes(old[:at] + piece + old[at + count :])


def swap(files, i, other):
    a, b = files[i], files[other % len(files)]
    old = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(old)


def delete(files, i):
    files[i].unlink()


NUMBERS = st.integers(0, 10**6)
PLACES = st.integers(0, 400) | NUMBERS  # in a header, or anywhere
COUNTS = st.sampled_from([0, 1, 4, 8, 10**6])
DAMAGE = st.one_of(
    st.tuples(st.just(splice), NUMBERS, PLACES, st.just(1), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just(splice), NUMBERS, PLACES, COUNTS, st.binary(max_size=9)),
    st.tuples(st.just(swap), NUMBERS, NUMBERS),
    st.tuples(st.just(delete), NUMBERS),
)


@settings(max_examples=150)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_whatever_happens_to_the_files_no_wrong_weights_are_loaded(template, damages):
    directory, saved = template
    with tempfile.TemporaryDirectory() as copied, contextlib.suppress(SnapshotError):
        shutil.copytree(directory, copied, dirs_exist_ok=True)
        for damage, which, *arguments in damages:
            files = sorted(Path(copied).iterdir())
            if files:
                damage(files, which % len(files), *arguments)
        store = SnapshotStore(copied)
        for snapshot in store:
            with contextlib.suppress(SnapshotError):
                assert_same_state(store.load(snapshot), saved[snapshot.step])


NO_JSON = (b"", b"[" * 100_000, b"\xff\xfe", b'{"a": 1, "a": 1}', b"9" * 10_000)


def test_every_edit_of_the_manifest_is_refused(tmp_path):
    _, saved = filled_store(tmp_path, 1)
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for bad in (*flipped(good, range(0, len(good), 5)), *NO_JSON):
        path.write_bytes(bad)
        with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
            SnapshotStore(tmp_path)
    path.write_text(json.dumps(json.loads(good), indent=2))
    assert_holds(SnapshotStore(tmp_path), saved)


def forged(content):
    """With the right checksum."""
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k != "checksum"}
        text = json.dumps(content, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(content)


def edited(entry=(), tensor=(), **top):
    """Changes the first snapshot, the first tensor, and fields."""

    def edit(content):
        content["snapshots"][0].update(entry)
        content["tensors"][0].update(tensor)
        return {**content, **top}

    return edit


def swapped(content):
    rows = content["snapshots"][0]["tensors"]
    rows[0], rows[1] = rows[1], rows[0]
    return content


def twice(content):
    return {**content, "snapshots": content["snapshots"] * 2}


FIRST, TENSOR = r"snapshots\[0\]", r"tensors\[0\]"
BAD_MANIFESTS = {  # what is forged in, and the field that is named
    "a list": (lambda content: [content], r"it must be of type dict, got \[{"),
    "the version before": (edited(format_version=2), r"format_version must be 3, got 2"),
    "a version like ours": (edited(format_version=3.0), "format_version must be of type int"),
    "another field": (edited(more=1), "it must have the fields format_version, tensors"),
    "a tensor as list": (edited(tensors=[[]]), TENSOR + r" must be of type dict, got \[\]"),
    "a dtype of another kind": (edited(tensor={"dtype": "nn"}), TENSOR + ".dtype must be the"),
    "another word for it": (edited(tensor={"dtype": "float"}), TENSOR + ".dtype must be the"),
    "a huge shape": (edited(tensor={"shape": [2**40, 2**40]}), TENSOR + ".shape must be sizes"),
    "a huge empty shape": (edited(tensor={"shape": [0, 2**64]}), TENSOR + ".shape must be sizes"),
    "a negative size": (edited(tensor={"shape": [-6, -4]}), TENSOR + ".shape must be sizes"),
    "a size as bool": (edited(tensor={"shape": [True, 24]}), TENSOR + ".shape must be sizes"),
    "twice the same name": (edited(tensor={"name": "0.bias"}), "differ from the others, got '0.b"),
    "escaping path": (edited(hashes=["../../etc/passwd"]), r"hashes\[0\] must be 64 hexadecimal"),
    "a longer hash": (edited(hashes=["0" * 65]), r"hashes\[0\] must be 64 hex"),
    "hash as number": (edited(hashes=[5]), r"hashes\[0\] must be 64 hexadecimal digits, got 5"),
    "two tensors for each other": (swapped, FIRST + ".sha256 must be that of"),
    "a tensor too few": (edited({"tensors": [0]}), FIRST + ".sha256 must be that of"),
    "a tensor beyond": (edited({"tensors": [10**6]}), FIRST + ".tensors must be positions"),
    "a tensor from the end": (edited({"tensors": [-1]}), FIRST + ".tensors must be posit"),
    "negative step": (edited({"step": -1}), FIRST + ".step must be >= 0, got -1"),
    "cycle as bool": (edited({"cycle": True}), FIRST + ".cycle must be of type int"),
    "a huge metric": (edited({"metrics": {"a": 10**400}}), r"\['a'\] must be of type float"),
    "twice the same step": (twice, "snapshots must have steps that rise"),
}


@pytest.mark.parametrize(("edit", "match"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, edit, match):
    filled_store(tmp_path, 1)
    path = tmp_path / "manifest.json"
    path.write_text(forged(manifest_of(tmp_path)))
    SnapshotStore(tmp_path)
    path.write_text(forged(edit(manifest_of(tmp_path))))
    refused = rf"(?s)manifest\.json is not a manifest of snapshots: .*({match})"
    with pytest.raises(SnapshotError, match=refused):
        SnapshotStore(tmp_path)


NO_MANIFESTS = {  # what comes into its place; it is no empty store
    "link": (link_out, "cannot be read: .*a symbolic link, which might lead"),
    "directory": (Path.mkdir, "cannot be read: .*not a file"),
    "nothing": (lambda path: None, "is missing, though there are snapshots"),
}


@pytest.mark.parametrize(("make", "match"), NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_a_manifest_that_is_no_file_is_neither_read_nor_replaced(tmp_path, make, match):
    directory = tmp_path / "store"
    store, saved = filled_store(directory)
    (directory / "manifest.json").rename(tmp_path / "outside")
    make(directory / "manifest.json")
    before = sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for act in (
        lambda: SnapshotStore(directory),
        lambda: store.save(saved[0], step=99, cycle=9),
        lambda: store.prune(keep=[]),
    ):
        with pytest.raises(SnapshotError, match=rf"manifest\.json {match}"):
            act()
    assert sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_signature_that_is_not_the_tensors_is_refused(tmp_path):
    store, _ = filled_store(tmp_path, 1)
    content = edited(tensor={"shape": [4, 6]})(manifest_of(tmp_path))
    (tmp_path / "manifest.json").write_text(forged(content))
    refused = r"at '0.weight': it holds a float32 \[6, 4\], not a .* \[4, 6"
    with pytest.raises(SnapshotError, match=refused):
        store.load(store.last(1)[0])


def test_leftovers_are_ignored_and_removed_on_the_next_save(tmp_path):
    store, saved = filled_store(tmp_path, 1)
    leftovers, directories = (
        [tmp_path / f"tensor-{d * 64}.safetensors", tmp_path / f".fastfreeze-{d * 16}.tmp"]
        for d in "01"
    )
    foreign = [tmp_path / "model.safetensors", tmp_path / "notes.tmp"]
    for path in directories:
        path.mkdir()
    for path in leftovers + foreign:
        path.write_bytes(b"x")
    assert len(SnapshotStore(tmp_path)) == 1
    store.save(saved[0], step=20, cycle=1)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign + directories)
    assert len(store) == 2


def disk_full_after(count, fsync=os.fsync):
    calls = itertools.count()
    return lambda fd: full_disk(fd) if next(calls) >= count else fsync(fd)


def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store, saved = filled_store(tmp_path)
    before = files_in(tmp_path)
    (new,) = states(1)
    for act, count in (
        (lambda: store.save(saved[0], step=20, cycle=1), 0),
        (lambda: store.save(new, step=20, cycle=1), 0),
        (lambda: store.save(new, step=20, cycle=1), 6),  # some of the tensors are there
        (lambda: store.prune(keep=store.last(1)), 0),
    ):
        monkeypatch.setattr("fastfreeze.files.os.fsync", disk_full_after(count))
        with pytest.raises(OSError, match="No space left"):
            act()
        assert files_in(tmp_path) == before


class StoppedError(BaseException):
    """As a kill: nothing goes on."""


class Stopping:
    """Stops before, or after, it writes the file of that number."""

    def __init__(self, at, written):
        self.at, self.written, self.count, self.turn = at, written, 0, threading.Lock()

    def write(self, path, content):
        with self.turn:
            number, self.count = self.count, self.count + 1
        if number > self.at or (number == self.at and not self.written):
            raise StoppedError
        write_atomic(path, content)
        if number == self.at:
            raise StoppedError

    def remove(self, store, manifest, remove=SnapshotStore._remove_leftovers):
        if self.count > self.at:
            raise StoppedError
        remove(store, manifest)


@pytest.mark.filterwarnings("ignore:.* holds snapshots of later steps")
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_stopped_at_any_write(tmp_path, monkeypatch, written):
    chain = sticky_chain(3)

    def run(store, done):
        for i, state in enumerate(chain):
            store.save(chain[0], step=i, cycle=0)
            store.save(state, step=i, cycle=i)  # in its place
            done.append(i)
        done.append("pruned")
        store.prune(keep=store.last(2))
        done.append("all")

    monkeypatch.setattr("fastfreeze.files.os.fsync", lambda _: None)
    for stop_at in itertools.count():
        directory, done, stopping = tmp_path / str(stop_at), [], Stopping(stop_at, written)
        with monkeypatch.context() as patch, contextlib.suppress(StoppedError):
            patch.setattr(SnapshotStore, "_remove_leftovers", lambda *a, s=stopping: s.remove(*a))
            for module in (store_module, tensors_module):
                patch.setattr(module, "write_atomic", stopping.write)
            run(SnapshotStore(directory), done)
        store = SnapshotStore(directory)
        if "pruned" in done:
            assert steps(store) in ([0, 1, 2], [1, 2])
        else:
            assert steps(store)[: len(done)] == done
        for snapshot in store:
            expected = [chain[snapshot.step]] + [chain[0]] * (snapshot.step not in done)
            assert raw_state(store.load(snapshot)) in map(raw_state, expected)
        run(store, [])  # nothing stands in the way of another run
        assert steps(store) == [1, 2]
        assert bytes_in(directory) == distinct_bytes(*chain[1:])
        if "all" in done:
            break
    assert stop_at > 12


def killed_state(step):
    """Some layers stay for six steps, some are tied."""
    frozen, weight = torch.full((2_000,), float(step // 6)), torch.full((5_000,), float(step))
    return {"frozen": frozen, "weight": weight, "tied": weight, "steps": torch.tensor(step)}


def save_for_ever(directory, told, ready):
    """Told are steps that are safe."""
    store = SnapshotStore(directory)
    for step in itertools.count(max(steps(store), default=-1) + 1):
        store.save(killed_state(step), step=step, cycle=step // 6, wait=step % 3 == 0)
        if step % 5 == 4:
            store.prune(keep=tuple(store)[-4:])
        if step % 3 == 0 or step % 5 == 4:
            append(told, f"{step}\n".encode())
            ready()


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_all_completed_snapshots_are_intact(tmp_path, kills):
    random_, told = random.Random(0), tmp_path / "told"
    for _ in range(kills):
        killed(save_for_ever, tmp_path / "store", told, after=random_.random() * 0.04)
        store = SnapshotStore(tmp_path / "store")
        found = steps(store)
        assert found == list(range(found[0], found[-1] + 1))
        assert found[-1] >= int(told.read_text().split()[-1])
        for snapshot in store:
            assert raw_state(store.load(snapshot)) == raw_state(killed_state(snapshot.step))
