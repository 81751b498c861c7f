"""Snapshots are stored once, in one order, and come back as they were."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import pickle
import re
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from fastfreeze.errors import FastfreezeWarning, SnapshotError
from fastfreeze.schedule import SnapshotCycles
from fastfreeze.snapshots import MemorySnapshots, Snapshot, SnapshotStore
from fastfreeze.snapshots.format import Entry, Manifest, manifest_bytes
from fastfreeze.snapshots.tensors import can_be_stored, content_hash
from tests.nets import small_model, tied_model
from tests.snapshots.stores import (
    assert_holds,
    assert_same_state,
    bytes_in,
    distinct_bytes,
    filled_store,
    full_disk,
    raw_state,
    states,
    steps,
    sticky_chain,
    tensor_bytes,
    tensors_in,
)


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    """An empty place for snapshots."""
    return SnapshotStore(tmp_path / "store") if request.param == "disk" else MemorySnapshots()


def test_what_was_saved_is_what_is_loaded(tmp_path):
    model = small_model()
    schedule = SnapshotCycles(total_steps=9, num_cycles=3)
    store = SnapshotStore(tmp_path / "new" / "directory")
    assert list(store) == []
    assert not store.directory.exists()
    expected = []
    for cycle, step in enumerate(schedule.cycle_ends):
        with torch.no_grad():
            model[0].weight.normal_()
        expected.append(copy.deepcopy(model.state_dict()))
        snapshot = store.save(model, step=step, cycle=cycle, metrics={"error": 0.5, "loss": 2})
        assert snapshot == list(store)[-1]
    reopened = SnapshotStore(store.directory)
    assert len(reopened) == 3
    assert [(s.step, s.cycle) for s in reopened] == [(3, 0), (6, 1), (9, 2)]
    assert [s.metrics for s in reopened] == [{"error": 0.5, "loss": 2.0}] * 3
    assert_holds(reopened, expected)
    other = small_model()
    reopened.load_into(other, reopened.last(2)[0])
    assert_same_state(other.state_dict(), expected[1])


def test_a_default_device_changes_nothing(place):
    model = small_model()
    can_be_stored.cache_clear()
    with torch.device("meta"):
        place.save(model, step=1, cycle=1)
        (snapshot,) = place
        found = place.load(snapshot)
    assert_same_state(found, model.state_dict())


def test_saving_a_step_again_replaces_it(tmp_path):
    store, (first, second, third) = filled_store(tmp_path)
    (again,) = states(1)
    store.save(dict(reversed(again.items())), step=20, cycle=1)  # in the first one's order
    assert steps(store) == [10, 20, 30]
    assert_holds(store, (first, again, third))
    before = tensors_in(tmp_path)
    store.save(third, step=30, cycle=2, metrics={"error": 1})  # the same bytes once more
    assert_same_state(store.load(store.last(1)[0]), third)
    assert store.last(1)[0].metrics == {"error": 1}
    assert tensors_in(tmp_path) == before
    store.save(second, step=15, cycle=1)
    assert steps(store) == [10, 15, 20, 30]
    assert store.last(2) == tuple(store)[2:]
    for m, message in ((5, "m must be at most 4"), (0, "m must be >= 1")):
        with pytest.raises(ValueError, match=message):
            store.last(m)


LEFT = {  # steps of an earlier run, and those of this one: what is warned of at its first save
    "empty": ([], [10, 5], None),
    "resumed at the last": ([10, 20], [20, 30], None),
    "gone on with": ([10, 20], [30, 15], None),
    "begun anew": ([10, 20, 30], [5, 6], r"later steps \(10, 20, 30\) than step 5,"),
    "begun anew at an equal step": ([10, 20], [10, 11], r"later steps \(20\) than step 10,"),
    "many": (range(9), [3, 2], r"later steps \(4, 5, 6 and 2 more\) than step 3,"),
}


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "later"])
@pytest.mark.parametrize(("left", "new", "match"), LEFT.values(), ids=LEFT)
def test_a_run_that_begins_among_later_snapshots_is_told_once(tmp_path, left, new, match, wait):
    (state,) = states(1)
    for step in left:
        SnapshotStore(tmp_path).save(state, step=step, cycle=0)
    store = SnapshotStore(tmp_path)
    with pytest.warns(FastfreezeWarning) if match else contextlib.nullcontext() as told:
        for step in new:
            store.save(state, step=step, cycle=0, wait=wait)
    assert set(steps(store)) == {*left, *new}
    if match:
        (warning,) = told
        expected = re.escape(f"{tmp_path} holds snapshots of ") + match
        assert re.match(expected, str(warning.message))
        assert warning.filename == __file__
    fresh = SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match="is of another model"):  # before anything is told
        fresh.save(tied_model(), step=1, cycle=0)
    fresh.prune(keep=[])  # as the warning says
    fresh.save(state, step=1, cycle=0)
    assert steps(fresh) == [1]


def test_tied_weights(tmp_path):
    store, model, other = SnapshotStore(tmp_path), tied_model(), tied_model()
    snapshot = store.save(model, step=1, cycle=0)
    store.load_into(other, snapshot)
    assert other[0].weight is other[1].weight
    assert torch.equal(other[0].weight, model[0].weight)
    state = store.load(snapshot)
    assert bytes_in(tmp_path) == 100
    state["0.weight"].zero_()
    assert torch.equal(state["1.weight"], model[1].weight)


DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
)


def odd_tensors():
    base = torch.randn(4, 6)
    state = {
        "transposed": base.t(),
        "overlapping": base[1:],
        "every other": base[:, ::2],
        "expanded": torch.randn(1, 3).expand(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(3, dtype=torch.bfloat16),
        "needs grad": torch.randn(3, requires_grad=True),
        "not a number": torch.tensor([math.nan, -0.0]),
        "zero": torch.tensor([0.0]),
        "minus zero": torch.tensor([-0.0]),
        "zero as int32": torch.tensor([0], dtype=torch.int32),
        "zero, 2-d": torch.tensor([[0.0]]),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        **{f"ends at {n}": torch.arange(33)[:n] for n in (1, 31, 32, 33)},
        **{str(dtype): torch.randint(0, 100, (5,)).to(dtype) for dtype in DTYPES},
    }
    return {name: t for name, t in state.items() if can_be_stored(t.dtype)}  # older safetensors


@pytest.mark.parametrize("options", [{}, {"wait": False}], ids=["", "later"])
def test_odd_tensors(place, options):
    state, on_disk = odd_tensors(), isinstance(place, SnapshotStore)
    for step in range(2):
        place.save(state, step=step, cycle=0, **(options if on_disk else {}))
    for snapshot in place:
        found = place.load(snapshot)
        assert list(found) == list(state)
        assert raw_state(found) == raw_state(state)
    if on_disk:
        assert len(tensors_in(place.directory)) == len({content_hash(t) for t in state.values()})
    else:
        first, second = (kept for _, kept in place._states)
        assert all(first[name] is second[name] for name in state)


def test_a_hash_is_of_dtype_shape_and_bytes(tmp_path):
    tensor = torch.tensor([[1.0, -2.0]])
    data = b"float32 [1, 2]\n" + bytes.fromhex("0000803f000000c0")
    assert content_hash(tensor) == hashlib.sha256(data).hexdigest()
    different = [tensor, tensor.t(), tensor[0], tensor.view(torch.int32), tensor.double()]
    assert len({content_hash(t) for t in different}) == len(different)
    (state,) = states(1)
    hashes = {SnapshotStore(tmp_path / d).save(state, step=1, cycle=0).sha256 for d in "abc"}
    assert len(hashes) == 1


def test_metrics_that_are_not_numbers_do_not_hold_up_a_failed_load(tmp_path):
    store, (state,) = SnapshotStore(tmp_path), states(1)
    snapshot = store.save(state, step=1, cycle=0, metrics={"loss": math.nan, "best": math.inf})
    (found,) = SnapshotStore(tmp_path)
    assert math.isnan(found.metrics["loss"])
    assert found.metrics["best"] == math.inf
    tensors_in(tmp_path)[0].unlink()
    with pytest.raises(SnapshotError, match="cannot be read"):
        store.load(snapshot)


def test_a_store_can_be_copied_and_pickled(tmp_path):
    store, saved = filled_store(tmp_path, 1)
    store.save(saved[0], step=99, cycle=1, wait=False)
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert steps(other) == [10, 99]


DENSE = r"model\['a'\] must be a dense tensor of a dtype of safetensors, got .*"
REFUSED = {
    "negative step": ({"step": -1}, ValueError, "step must be >= 0"),
    "float step": ({"step": 1.0}, TypeError, "step must be an int"),
    "bool cycle": ({"cycle": True}, TypeError, "cycle must be an int"),
    "metric": ({"metrics": {"a": "low"}}, TypeError, r"metrics\['a'\] must be a number, got 'low'"),
    "huge metric": ({"metrics": {"a": 10**400}}, ValueError, r"metrics\['a'\] must fit into a fl"),
    "entry": ({"model": {"a": [1.0]}}, TypeError, r"model\['a'\] must be a tensor, got list"),
    "model": ({"model": 3}, TypeError, "model must be a state dict, got int"),
    "name": ({"model": {1: torch.ones(1)}}, TypeError, "must have strings for names, got 1"),
    "dtype": ({"model": {"a": torch.ones(1).cdouble()}}, TypeError, DENSE + "complex128"),
    "sparse": ({"model": {"a": torch.eye(2).to_sparse()}}, TypeError, DENSE + "torch.sparse_coo"),
    "meta": ({"model": {"a": torch.ones(1, device="meta")}}, TypeError, DENSE + "meta"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_saves(tmp_path, place, arguments, error, match):
    (state,) = states(1)
    place.save(small_model(), step=10, cycle=0)
    before, files = tuple(place), list(tmp_path.rglob("*.*"))
    for wait in ({}, {"wait": False}) if isinstance(place, SnapshotStore) else ({},):
        with pytest.raises(error, match=match):
            place.save(**{"model": state, "step": 99, "cycle": 9, **arguments, **wait})
    assert tuple(place) == before
    assert list(tmp_path.rglob("*.*")) == files


def wider():
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3))


WIDER = r"unlike: '0.weight': float32 \[6, 4\], expected float32 \[7, 4\], '0.bias': .* and 4 more"
OTHER_MODELS = {
    "wider": (wider, WIDER),
    "deeper": (lambda: nn.Sequential(*small_model(), nn.Linear(3, 3)), r"missing: '4.weight', '4"),
    "shallower": (lambda: small_model()[:2], r"unexpected: '3.weight', '3.bias'"),
    "double": (lambda: small_model().double(), r"float32 \[6, 4\], expected float64 \[6, 4\]"),
}


@pytest.mark.parametrize(("make", "match"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_left_untouched(tmp_path, make, match):
    store, _ = filled_store(tmp_path)
    other = make()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SnapshotError, match=match):
        store.load_into(other, store.last(1)[0])
    for wait in (True, False):
        with pytest.raises(SnapshotError, match=r"the model to be saved in .* is of another model"):
            store.save(other, step=99, cycle=9, wait=wait)
    assert_same_state(other.state_dict(), before)
    assert steps(store) == [10, 20, 30]


def test_a_shared_prefix_is_stored_once(tmp_path):
    chain = sticky_chain()
    store = SnapshotStore(tmp_path)
    for i, state in enumerate(chain):
        before = bytes_in(tmp_path)
        store.save(state, step=i, cycle=i)
        new = tensor_bytes(state[f"{k}.{what}"] for k in range(i, 4) for what in ("weight", "bias"))
        assert bytes_in(tmp_path) - before == new
    assert len(tensors_in(tmp_path)) == len({content_hash(t) for s in chain for t in s.values()})
    assert store.bytes_on_disk == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert store.bytes_on_disk < 0.8 * tensor_bytes(t for state in chain for t in state.values())
    assert_holds(SnapshotStore(tmp_path), chain)


def test_the_manifest_stays_small():
    """Of 600 tensors, a further snapshot that shares all but one adds a few KiB."""
    *shared, a, b = (f"{i:064}" for i in range(601))
    entries = tuple(Entry(Snapshot(1, 0, {}, "", last), (*shared, last)) for last in (a, b))
    first, both = (len(manifest_bytes(Manifest({}, entries[:n]))) for n in (1, 2))
    assert both - first < 4096


def test_pruning(place):
    chain = sticky_chain(5)
    snapshots = [place.save(state, step=i, cycle=i) for i, state in enumerate(chain)]
    assert place.prune(keep=place) == ()
    assert place.prune(keep=place.last(4)) == (snapshots[0],)
    place.remove(snapshots[2])
    assert tuple(place) == (snapshots[1], snapshots[3], snapshots[4])
    assert place.prune(keep=iter([snapshots[4], snapshots[1]])) == (snapshots[3],)
    assert_holds(place, (chain[1], chain[4]))
    if isinstance(place, SnapshotStore):
        assert bytes_in(place.directory) == distinct_bytes(chain[1], chain[4])
        assert place.bytes_on_disk == sum(p.stat().st_size for p in place.directory.iterdir())
    for gone in (snapshots[0], snapshots[2], snapshots[3]):
        for act in (place.load, place.remove, lambda s: place.prune(keep=[s])):
            with pytest.raises(SnapshotError, match="is not in"):
                act(gone)
    with pytest.raises(TypeError, match="snapshot must be a Snapshot, got 3"):
        place.prune(keep=[3])
    assert len(place) == 2
    place.prune(keep=[])
    assert list(place) == []
    place.save({"another": torch.ones(1)}, step=0, cycle=0)
    assert len(place) == 1


def test_a_replaced_snapshot_is_not_taken_for_the_new_one(place):
    first, second = states(2)
    old = place.save(first, step=1, cycle=0)
    new = place.save(second, step=1, cycle=0)
    assert_same_state(place.load(new), second)
    for gone in (old, Snapshot(1, 0, {}, "", "/../../a"), Snapshot(1, 0, {}, "")):
        with pytest.raises(SnapshotError, match="is not in"):
            place.load(gone)
    with pytest.raises(TypeError, match="snapshot must be a Snapshot, got 10"):
        place.load(10)


def test_export(tmp_path, place, monkeypatch):
    model = tied_model()
    snapshot = place.save(model, step=1, cycle=0)
    path = tmp_path / "model.safetensors"
    place.export(snapshot, path)
    assert_same_state(safetensors.torch.load_file(path), dict(sorted(model.state_dict().items())))
    before = path.read_bytes()
    monkeypatch.setattr("fastfreeze.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        place.export(snapshot, path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_memory_is_not_changed_from_outside():
    model, memory = small_model(), MemorySnapshots("cpu")
    expected = copy.deepcopy(model.state_dict())
    snapshot = memory.save(model, step=0, cycle=0)
    other = small_model()
    memory.load_into(other, snapshot)
    for changed in (model.state_dict(), memory.load(snapshot), other.state_dict()):
        for tensor in changed.values():
            tensor.zero_()
    memory.save(model, step=1, cycle=0)
    assert_same_state(memory.load(snapshot), expected)
    with pytest.raises(SnapshotError, match=r"step 0 of MemorySnapshots\(2 snapshots\) is of an"):
        memory.load_into(small_model().double(), snapshot)
    with pytest.raises(SnapshotError, match=r"the model to be saved in .* is of another model"):
        memory.save(small_model().double(), step=2, cycle=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """Copies are made in the stream's order, before the weights change."""
    store, model = SnapshotStore(tmp_path), nn.Linear(2048, 2048, device="cuda")
    expected = {name: t.cpu() for name, t in model.state_dict().items()}
    memories = [MemorySnapshots(device) for device in (None, "cuda", "cpu")]
    torch.cuda._sleep(10**8)
    store.save(model, step=0, cycle=0, wait=False)
    found = [memory.save(model, step=0, cycle=0) for memory in memories]
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    assert_same_state(store.load(store.last(1)[0]), expected)
    for memory, snapshot in zip(memories, found, strict=True):
        loaded = {name: t.cpu() for name, t in memory.load(snapshot).items()}
        assert_same_state(loaded, expected)


def test_directories_may_be_replaced_and_the_working_directory_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, saved = filled_store("store")
    monkeypatch.chdir("/")
    assert len(store) == 3
    shutil.rmtree(tmp_path / "store")
    snapshot = store.save(saved[1], step=20, cycle=1)
    assert list(store) == [snapshot]
    assert_same_state(SnapshotStore(tmp_path / "store").load(snapshot), saved[1])


def test_no_place_for_snapshots(tmp_path):
    (tmp_path / "file").write_text("")
    for make, error, message in (
        (lambda: SnapshotStore(tmp_path / "file"), SnapshotError, "file must be a directory"),
        (lambda: SnapshotStore(3), TypeError, "directory must be a path, got 3"),
        (lambda: MemorySnapshots(3), TypeError, "device must be a torch.device, a .* got 3"),
    ):
        with pytest.raises(error, match=message):
            make()
