"""Snapshots survive kills and notice damage."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import random
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from fastfreeze.ensemble import (
    Snapshot,
    SnapshotEnsemble,
    SnapshotStore,
)
from fastfreeze.errors import SnapshotError
from fastfreeze.schedule import SnapshotCycles


def small_model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def states(count):
    return [small_model().state_dict() for _ in range(count)]


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def filled_store(directory, count=3):
    store, saved = SnapshotStore(directory), states(count)
    for i, state in enumerate(saved):
        store.save(state, step=10 * (i + 1), cycle=i, metrics={"error": 0.1 * i})
    return store, saved


def only_snapshot_file(directory):
    (path,) = directory.glob("*.safetensors")
    return path


def test_what_was_saved_is_what_is_loaded(tmp_path):
    model = small_model()
    schedule = SnapshotCycles(total_steps=9, num_cycles=3)
    store = SnapshotStore(tmp_path / "new" / "directory")
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
    for snapshot, state in zip(reopened, expected, strict=True):
        assert_same_state(reopened.load(snapshot), state)
    other = small_model()
    reopened.load_into(other, reopened.last(2)[0])
    assert_same_state(other.state_dict(), expected[1])


def test_the_last_snapshots(tmp_path):
    store, _ = filled_store(tmp_path)
    assert [s.step for s in store.last(2)] == [20, 30]
    assert store.last(3) == tuple(store)
    for m, message in ((4, "m must be at most 3"), (0, "m must be >= 1")):
        with pytest.raises(ValueError, match=message):
            store.last(m)


def test_an_empty_store(tmp_path):
    store = SnapshotStore(tmp_path / "absent")
    assert len(store) == 0
    assert list(store) == []
    assert not store.directory.exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    store, (first, second, third) = filled_store(tmp_path)
    (again,) = states(1)
    store.save(again, step=20, cycle=1)
    assert [s.step for s in store] == [10, 20, 30]
    for snapshot, state in zip(store, (first, again, third), strict=True):
        assert_same_state(store.load(snapshot), state)
    store.save(third, step=30, cycle=2, metrics={"error": 1})  # the same bytes once more
    assert_same_state(store.load(store.last(1)[0]), third)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    store.save(second, step=15, cycle=1)
    assert [s.step for s in store] == [10, 15, 20, 30]


def tied_model():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights(tmp_path):
    store, model, other = SnapshotStore(tmp_path), tied_model(), tied_model()
    snapshot = store.save(model, step=1, cycle=0)
    store.load_into(other, snapshot)
    assert other[0].weight is other[1].weight
    assert torch.equal(other[0].weight, model[0].weight)


def test_odd_tensors(tmp_path):
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
    }
    store = SnapshotStore(tmp_path)
    assert_same_state(store.load(store.save(state, step=0, cycle=0)), state)


def test_equal_weights_give_equal_files(tmp_path):
    (state,) = states(1)
    hashes = {SnapshotStore(tmp_path / d).save(state, step=1, cycle=0).sha256 for d in "abc"}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"step": -1}, ValueError, "step must be >= 0"),
        ({"step": 1.0}, TypeError, "step must be an int"),
        ({"cycle": True}, TypeError, "cycle must be an int"),
        ({"metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\] must be a number, got 'low'"),
        ({"model": {"a": [1.0]}}, TypeError, r"model\['a'\] must be a tensor, got list"),
        ({"model": 3}, TypeError, "model must be a state dict, got int"),
    ],
    ids=["negative step", "float step", "bool cycle", "metric", "entry", "model"],
)
def test_refused_saves(tmp_path, arguments, error, match):
    store, _ = filled_store(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (state,) = states(1)
    with pytest.raises(error, match=match):
        store.save(**{"model": state, "step": 99, "cycle": 9, **arguments})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


OTHER_MODELS = {
    "wider": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3)),
        r"unlike: '0.weight': float32 \[6, 4\], expected float32 \[7, 4\], '0.bias': .* and 4 more",
    ),
    "deeper": (lambda: nn.Sequential(*small_model(), nn.Linear(3, 3)), r"missing: '4.weight', '4"),
    "shallower": (lambda: small_model()[:2], r"unexpected: '3.weight', '3.bias'"),
    "double": (
        lambda: small_model().double(),
        r"unlike: '0.weight': float32 \[6, 4\], expected float64 \[6, 4\]",
    ),
}


@pytest.mark.parametrize(("make", "match"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_left_untouched(tmp_path, make, match):
    store, saved = filled_store(tmp_path)
    other = make()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SnapshotError, match=match):
        store.load_into(other, store.last(1)[0])
    with pytest.raises(SnapshotError, match=r"snapshots\[0\] is of another model"):
        SnapshotEnsemble(other, saved)
    with pytest.raises(SnapshotError, match=r"the model to be saved in .* is of another model"):
        store.save(other, step=99, cycle=9)
    assert_same_state(other.state_dict(), before)
    assert [s.step for s in store] == [10, 20, 30]


def test_a_damaged_snapshot_is_never_loaded(tmp_path):
    store, (expected,) = filled_store(tmp_path, 1)
    (snapshot,) = store
    path = only_snapshot_file(tmp_path)
    good = path.read_bytes()
    random_ = random.Random(0)
    for _ in range(200):
        damaged = bytearray(good)
        damaged[random_.randrange(len(good))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match=rf"{path.name} is truncated or altered"):
            store.load(snapshot)
    for size in (0, 7, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(SnapshotError, match=rf"{path.name} is truncated or altered"):
            store.load(snapshot)
    path.unlink()
    with pytest.raises(SnapshotError, match=rf"{path.name} cannot be read"):
        store.load(snapshot)
    path.write_bytes(good)
    assert_same_state(store.load(snapshot), expected)


def test_a_damaged_manifest_never_gives_wrong_weights(tmp_path):
    store, saved = filled_store(tmp_path)
    by_step = dict(zip((10, 20, 30), saved, strict=True))
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    random_ = random.Random(0)
    noticed = 0
    for _ in range(400):
        damaged = bytearray(good)
        damaged[random_.randrange(len(good))] = random_.randrange(256)
        path.write_bytes(damaged)
        try:
            for snapshot in SnapshotStore(tmp_path):
                assert_same_state(store.load(snapshot), by_step[snapshot.step])
        except SnapshotError:
            noticed += 1
    assert noticed > 200


def edited(entry=None, **top):
    def edit(content):
        content.update(top)
        content["snapshots"][0].update(entry or {})
        return content

    return edit


BAD_MANIFESTS = {
    "a list": lambda content: [content],
    "null": lambda content: None,
    "future version": edited(format_version=2),
    "no version": lambda content: {k: v for k, v in content.items() if k != "format_version"},
    "no tensors": edited(tensors=None),
    "no snapshots": lambda content: {**content, "snapshots": 3},
    "escaping path": edited({"file": "../../etc/passwd"}),
    "absolute path": edited({"file": "/etc/passwd"}),
    "escaping hash": edited(
        {"sha256": "/../../../../../a", "file": "step-00000010-/../../../../../a.safetensors"}
    ),
    "another step's file": edited({"step": 11}),
    "negative step": edited({"step": -1}),
    "step as text": edited({"step": "10"}),
    "hash as number": edited({"sha256": 5}),
    "metrics as list": edited({"metrics": [1]}),
    "unknown entry": edited({"pickle": "x"}),
    "twice the same step": lambda c: {**c, "snapshots": c["snapshots"][:1] * 2},
}


@pytest.mark.parametrize("edit", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, edit):
    filled_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
        SnapshotStore(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\xff\xfe"], ids=["", "{", "[[[", "bytes"]
)
def test_a_manifest_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
        SnapshotStore(tmp_path)


def test_a_snapshot_made_up_by_hand_cannot_leave_the_directory(tmp_path):
    store, _ = filled_store(tmp_path / "store")
    (tmp_path / "a.safetensors").write_bytes(b"secret")
    with pytest.raises(SnapshotError, match="names no file that a store writes"):
        store.load(Snapshot(1, 0, {}, "", "/../../a"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"not a safetensors file", "is not a safetensors file"),
        (safetensors.torch.save({"other": torch.ones(2)}), "missing: '0.weight'"),
    ],
    ids=["garbage", "other tensors"],
)
def test_a_forged_snapshot_is_refused(tmp_path, data, match):
    """Its hash is right, its content is not."""
    store, _ = filled_store(tmp_path, 1)
    (snapshot,) = store
    forged = dataclasses.replace(snapshot, sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / forged.file).write_bytes(data)
    with pytest.raises(SnapshotError, match=match):
        store.load(forged)


def test_leftovers_are_ignored_and_removed_on_the_next_save(tmp_path):
    store, saved = filled_store(tmp_path, 1)
    leftovers = [
        tmp_path / f"step-00000020-{'0' * 16}.safetensors",
        tmp_path / f".step-00000020-{'0' * 16}.safetensors.tmp",
        tmp_path / ".manifest.json.tmp",
    ]
    foreign = [tmp_path / "model.safetensors", tmp_path / "notes.tmp"]
    for path in leftovers + foreign:
        path.write_bytes(b"x")
    assert len(SnapshotStore(tmp_path)) == 1
    store.save(saved[0], step=20, cycle=1)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign)
    assert len(store) == 2


def test_a_lost_manifest_is_not_an_empty_store(tmp_path):
    store, saved = filled_store(tmp_path, 2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        SnapshotError, match=r"manifest\.json is missing, though there are snapshots"
    ):
        SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        store.save(saved[0], step=99, cycle=9)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store, saved = filled_store(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastfreeze.ensemble.snapshots.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(saved[0], step=20, cycle=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def save_for_ever(directory, told):
    """Every other save replaces a step."""
    store = SnapshotStore(directory)
    count = 2 * len(store)
    while True:
        weight = torch.full((10_000,), float(count))
        store.save({"weight": weight, "tied": weight}, step=count // 2, cycle=0)
        told.send(count)
        count += 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_killed_at_any_moment_all_completed_snapshots_are_intact(tmp_path):
    context = multiprocessing.get_context("fork")
    random_ = random.Random(0)
    for _ in range(12):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=save_for_ever, args=(tmp_path, sender), daemon=True)
        writer.start()
        sender.close()
        told = [receiver.recv()]
        kill_at = time.monotonic() + random_.random() * 0.03
        while time.monotonic() < kill_at:
            SnapshotStore(tmp_path)  # a reader never meets half a manifest
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                told.append(receiver.recv())
        store = SnapshotStore(tmp_path)
        snapshots = tuple(store)
        assert [s.step for s in snapshots] == list(range(len(snapshots)))
        assert len(snapshots) > told[-1] // 2
        for snapshot in snapshots:
            state = store.load(snapshot)
            (count,) = state["weight"].unique().tolist()
            assert count // 2 == snapshot.step
            assert torch.equal(state["weight"], state["tied"])
