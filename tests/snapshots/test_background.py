"""Saves that do not wait, and stores that several threads and processes use."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastfreeze.snapshots.store as store_module
from fastfreeze.errors import FastfreezeWarning, SnapshotError
from fastfreeze.snapshots import SnapshotStore
from fastfreeze.snapshots.tensors import content_hash, read_tensor
from tests.killed import alive, killed
from tests.nets import small_model
from tests.snapshots.stores import (
    assert_holds,
    assert_same_state,
    files_in,
    filled_store,
    full_disk,
    states,
    steps,
    sticky_chain,
)


@pytest.fixture
def held_back(monkeypatch):
    """The thread that writes waits for this event before it looks at the first tensor."""
    event = threading.Event()

    def waiting(tensor):
        assert event.wait(20)
        return content_hash(tensor)

    monkeypatch.setattr(store_module, "content_hash", waiting)
    yield event
    event.set()


def test_weights_may_change_right_after_a_save_that_does_not_wait(tmp_path, held_back):
    store, model = SnapshotStore(tmp_path), small_model()
    expected = copy.deepcopy(model.state_dict())
    assert store.save(model, step=0, cycle=0, wait=False) is None
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    held_back.set()
    (snapshot,) = store
    assert_same_state(store.load(snapshot), expected)


def test_saves_are_written_in_order(tmp_path, held_back):
    store, saved = SnapshotStore(tmp_path), states(6)
    threading.Timer(0.05, held_back.set).start()
    for i, state in enumerate(saved[:4]):
        store.save(state, step=i % 2, cycle=i, wait=False)
    store.save(saved[4], step=1, cycle=4)
    store.save(saved[5], step=2, cycle=5, wait=False)
    assert [(s.step, s.cycle) for s in store] == [(0, 2), (1, 4), (2, 5)]
    assert_holds(store, (saved[2], saved[4], saved[5]))


def test_a_second_copy_is_made_only_when_the_first_is_written(tmp_path, held_back):
    store, saved = SnapshotStore(tmp_path), states(2)
    save = functools.partial(store.save, cycle=0, wait=False)
    save(saved[0], step=0)
    second = threading.Thread(target=save, args=(saved[1],), kwargs={"step": 1})
    second.start()
    second.join(0.2)
    assert second.is_alive()
    held_back.set()
    second.join()
    assert steps(store) == [0, 1]
    assert_holds(store, saved)


def test_a_save_in_the_middle_of_a_save_is_refused(tmp_path, monkeypatch):
    """As a signal's handler may begin one, which would wait for itself."""
    store, model = SnapshotStore(tmp_path), small_model()

    def interrupted(tensor):
        with pytest.raises(SnapshotError, match="is being written to by this very thread"):
            store.save(model, step=2, cycle=0)
        return content_hash(tensor)

    monkeypatch.setattr(store_module, "content_hash", interrupted)
    store.save(model, step=1, cycle=0)
    assert steps(store) == [1]


NEXT_CALLS = {
    "flush": lambda store, _: store.flush(),
    "save": lambda store, _: store.save(small_model(), step=50, cycle=5),
    "save later": lambda store, _: store.save(small_model(), step=50, cycle=5, wait=False),
    "iter": lambda store, _: list(store),
    "len": lambda store, _: len(store),
    "last": lambda store, _: store.last(1),
    "load": SnapshotStore.load,
    "load_into": lambda store, snapshot: store.load_into(small_model(), snapshot),
    "export": lambda store, snapshot: store.export(snapshot, "never written"),
    "remove": SnapshotStore.remove,
    "prune": lambda store, _: store.prune(keep=[]),
    "bytes_on_disk": lambda store, _: store.bytes_on_disk,
}


@pytest.mark.parametrize("act", NEXT_CALLS.values(), ids=NEXT_CALLS)
def test_what_goes_wrong_later_is_raised_by_the_next_call_once(tmp_path, monkeypatch, act):
    store, _ = filled_store(tmp_path)
    snapshots, before = tuple(store), files_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fastfreeze.files.os.fsync", full_disk)
        assert store.save(small_model(), step=40, cycle=4, wait=False) is None
        with pytest.raises(OSError, match="No space left"):
            act(store, snapshots[0])
    assert tuple(store) == snapshots
    assert files_in(tmp_path) == before
    store.save(small_model(), step=40, cycle=4, wait=False)
    assert steps(store) == [10, 20, 30, 40]


@pytest.mark.filterwarnings("ignore:.* holds snapshots of later steps")
def test_threads_and_stores_of_one_directory_lose_nothing(tmp_path):
    saved = states(16)
    stores = [SnapshotStore(path) for path in (tmp_path, tmp_path / ".." / tmp_path.name)]

    def work(step):
        store = stores[step % 2]
        store.save(saved[step], step=step, cycle=0, wait=step % 3 == 0)
        for snapshot in store:
            assert_same_state(store.load(snapshot), saved[snapshot.step])

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(16)))
    for store in stores:
        store.flush()
    del store, stores[0]  # the other one still has its turn
    assert steps(stores[0]) == list(range(16))
    stores[0].prune(keep=stores[0].last(12))
    found = SnapshotStore(tmp_path)
    assert steps(found) == list(range(4, 16))
    assert_holds(found, saved[4:])


def test_a_reader_beside_a_writer_that_prunes(tmp_path):
    """What is removed while it is read is said to be gone, not damaged."""
    chain = sticky_chain(4)
    writer, reader = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    first = writer.save(chain[1], step=0, cycle=0)

    def write():
        for _ in range(10):
            writer.save(chain[2], step=1, cycle=0)
            writer.prune(keep=[first])
            writer.save(chain[3], step=0, cycle=0)
            writer.save(chain[1], step=0, cycle=0)

    thread, loads = threading.Thread(target=write), 0
    thread.start()
    while thread.is_alive():
        for snapshot in [s for s in reader if s.sha256 == first.sha256]:
            try:
                assert_same_state(reader.load(snapshot), chain[1])
                loads += 1
            except SnapshotError as error:
                if "is not in" not in str(error):
                    raise
    assert loads > 3


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_snapshot_that_is_removed_while_it_is_read(tmp_path, monkeypatch, comes_back):
    """It is said to be gone, not damaged; one that is saved again is read again."""
    saved = states(2)
    writer, reader = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    first, second = (writer.save(state, step=i, cycle=i) for i, state in enumerate(saved))

    def read_late(*arguments):
        monkeypatch.setattr(store_module, "read_tensor", read_tensor)
        writer.remove(second)
        try:
            return read_tensor(*arguments)
        finally:
            if comes_back:
                writer.save(saved[1], step=1, cycle=1)

    monkeypatch.setattr(store_module, "read_tensor", read_late)
    if comes_back:
        assert_same_state(reader.load(second), saved[1])
    else:
        with pytest.raises(SnapshotError, match="is not in"):
            reader.load(second)
    assert_same_state(reader.load(first), saved[0])


def test_a_store_that_is_let_go_of_saves_first(tmp_path, held_back):
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)
    thread = store._background._calls[0][0]
    del store
    gc.collect()
    held_back.set()
    thread.join(20)
    assert steps(SnapshotStore(tmp_path)) == [1]


def test_a_store_that_is_let_go_of_tells_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("fastfreeze.files.os.fsync", full_disk)
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)
    store._background._calls[0][0].join(20)
    with pytest.warns(FastfreezeWarning, match=r"a snapshot was not saved, .*No space left"):
        del store


EXITS = """
import sys, threading, time, torch
import fastfreeze.files as files
from fastfreeze import SnapshotStore

fsync = files.os.fsync
full = None

def slow(fd):
    time.sleep(0.1)
    if threading.current_thread() in [thread for thread, _ in full._background._calls]:
        raise OSError(28, "No space left")
    fsync(fd)

files.os.fsync = slow
store, full = map(SnapshotStore, sys.argv[1:])
full.save({"weight": torch.ones(1)}, step=0, cycle=0, wait=False)
for step in range(3):
    store.save({"weight": torch.full((1,), float(step))}, step=step, cycle=0, wait=False)
"""


def test_an_interpreter_that_exits_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EXITS, tmp_path / "well", tmp_path / "full"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    store = SnapshotStore(tmp_path / "well")
    assert [store.load(s)["weight"].tolist() for s in store] == [[0.0], [1.0], [2.0]]
    assert len(SnapshotStore(tmp_path / "full")) == 0
    assert done.stderr.count("a snapshot was not saved, ") == 1
    assert "No space left" in done.stderr


def saves_and_waits(directory, ready):
    store = SnapshotStore(directory)
    store.save(small_model(), step=1, cycle=0)
    ready()
    time.sleep(60)


@pytest.mark.parametrize("wait", [True, False])
def test_a_second_process_that_writes_is_refused(tmp_path, wait):
    refused = pytest.raises(SnapshotError, match=f"^{tmp_path} is in use by another process")
    with alive(saves_and_waits, tmp_path):
        store, before = SnapshotStore(tmp_path), files_in(tmp_path)
        (snapshot,) = store
        with refused:
            store.save(small_model(), step=2, cycle=0, wait=wait)
        with refused:
            store.remove(snapshot)
        assert len(store.load(snapshot)) == len(small_model().state_dict())
        assert files_in(tmp_path) == before
    store.save(small_model(), step=2, cycle=0, wait=wait)
    assert steps(store) == [1, 2]


def saves_as_a_child(store, ready):
    store.flush()  # waits for nothing
    with pytest.raises(SnapshotError, match="in use by another process"):
        store.save(small_model(), step=9, cycle=0)
    ready()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_of_a_writer_waits_for_nothing_and_is_refused(tmp_path, held_back):
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)  # a thread is in the middle of it
    killed(saves_as_a_child, store)
    held_back.set()
    store.save(small_model(), step=2, cycle=0)
    assert steps(store) == [1, 2]
