"""Snapshots are stored once, survive kills, and notice damage."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastfreeze.snapshots.store as store_module
import fastfreeze.snapshots.tensors as tensors_module
from fastfreeze.ensemble import SnapshotEnsemble
from fastfreeze.errors import FastfreezeWarning, SnapshotError
from fastfreeze.files import write_atomic
from fastfreeze.schedule import SnapshotCycles
from fastfreeze.snapshots import MemorySnapshots, Snapshot, SnapshotStore
from fastfreeze.snapshots.tensors import can_be_stored, content_hash, read_tensor, tensor_path


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


def tensors_in(directory):
    return sorted(directory.glob("*.safetensors"))


def file_of(directory, tensor):
    return tensor_path(directory, content_hash(tensor))


def files_in(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def bytes_in(directory):
    """Of the tensors alone."""
    return sum(tensor_bytes(safetensors.torch.load_file(p).values()) for p in tensors_in(directory))


def distinct_bytes(*saved):
    """Of tensors that differ, in a plain way."""
    found = []
    for state in saved:
        for t in state.values():
            if not any(t.shape == o.shape and t.dtype == o.dtype and t.equal(o) for o in found):
                found.append(t)
    return tensor_bytes(found)


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    """An empty place for snapshots."""
    return SnapshotStore(tmp_path / "store") if request.param == "disk" else MemorySnapshots()


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


def test_a_default_device_changes_nothing(place):
    model = small_model()
    can_be_stored.cache_clear()
    with torch.device("meta"):
        place.save(model, step=1, cycle=1)
        (snapshot,) = place
        found = place.load(snapshot)
    assert_same_state(found, model.state_dict())


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
    before = tensors_in(tmp_path)
    store.save(third, step=30, cycle=2, metrics={"error": 1})  # the same bytes once more
    assert_same_state(store.load(store.last(1)[0]), third)
    assert store.last(1)[0].metrics == {"error": 1}
    assert tensors_in(tmp_path) == before
    store.save(second, step=15, cycle=1)
    assert [s.step for s in store] == [10, 15, 20, 30]


LEFT = {  # steps of an earlier run, and those of this one: what is warned of at its first save
    "empty": ([], [10, 5], None),
    "resumed at the last": ([10, 20], [20, 30], None),
    "gone on with": ([10, 20], [30, 15], None),
    "begun anew": ([10, 20, 30], [5, 6], r"later steps \(10, 20, 30\) than step 5,"),
    "begun anew at an equal step": ([10, 20], [10, 11], r"later steps \(20\) than step 10,"),
    "many": (range(9), [3, 2], r"later steps \(4, 5, 6 and 2 more\) than step 3,"),
}


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "later"])
@pytest.mark.parametrize(("left", "steps", "match"), LEFT.values(), ids=LEFT)
def test_a_run_that_begins_among_later_snapshots_is_told_once(tmp_path, left, steps, match, wait):
    (state,) = states(1)
    for step in left:
        SnapshotStore(tmp_path).save(state, step=step, cycle=0)
    store = SnapshotStore(tmp_path)
    with pytest.warns(FastfreezeWarning) if match else contextlib.nullcontext() as told:
        for step in steps:
            store.save(state, step=step, cycle=0, wait=wait)
    store.flush()
    assert {s.step for s in store} == {*left, *steps}
    if match:
        assert len(told) == 1
        text = str(told[0].message)
        assert re.match(re.escape(f"{tmp_path} holds snapshots of ") + match, text)
        assert told[0].filename == __file__


def test_what_an_earlier_run_has_left_is_removed_as_the_warning_says(tmp_path):
    filled_store(tmp_path)
    store, (state,) = SnapshotStore(tmp_path), states(1)
    store.prune(keep=[])
    store.save(state, step=5, cycle=0)
    assert [s.step for s in store] == [5]


def test_another_model_is_refused_before_anything_is_told(tmp_path):
    filled_store(tmp_path)
    with pytest.raises(SnapshotError, match="is of another model"):
        SnapshotStore(tmp_path).save(tied_model(), step=5, cycle=0)


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
    state = store.load(snapshot)
    assert bytes_in(tmp_path) == 100
    state["0.weight"].zero_()
    assert torch.equal(state["1.weight"], model[1].weight)


def raw(tensor):
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.dtype, plain.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes()


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


@pytest.mark.parametrize("wait", [True, False])
def test_odd_tensors(tmp_path, wait):
    state = odd_tensors()
    store = SnapshotStore(tmp_path)
    store.save(state, step=0, cycle=0, wait=wait)
    store.save(state, step=1, cycle=0, wait=wait)
    store.flush()
    assert len(tensors_in(tmp_path)) == len({content_hash(t) for t in state.values()})
    found = store.load(store.last(1)[0])
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert raw(found[name]) == raw(tensor), name


def test_odd_tensors_in_memory():
    state, memory = odd_tensors(), MemorySnapshots()
    first, second = (memory.save(state, step=i, cycle=0) for i in range(2))
    for snapshot in (first, second):
        found = memory.load(snapshot)
        assert all(raw(found[name]) == raw(tensor) for name, tensor in state.items())
    kept = memory._states[0][1], memory._states[1][1]
    assert all(kept[0][name] is kept[1][name] for name in state)


def test_a_hash_is_of_dtype_shape_and_bytes():
    tensor = torch.tensor([[1.0, -2.0]])
    data = b"float32 [1, 2]\n" + bytes.fromhex("0000803f000000c0")
    assert content_hash(tensor) == hashlib.sha256(data).hexdigest()
    different = [tensor, tensor.t(), tensor[0], tensor.view(torch.int32), tensor.double()]
    assert len({content_hash(t) for t in different}) == len(different)


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
        assert [s.step for s in other] == [10, 99]


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
        ({"metrics": {"loss": 10**400}}, ValueError, r"metrics\['loss'\] must fit into a float"),
        ({"model": {"a": [1.0]}}, TypeError, r"model\['a'\] must be a tensor, got list"),
        ({"model": 3}, TypeError, "model must be a state dict, got int"),
        ({"model": {1: torch.ones(1)}}, TypeError, "model must have strings for names, got 1"),
        (
            {"model": {"a": torch.ones(1, dtype=torch.complex128)}},
            TypeError,
            r"model\['a'\] must be a dense tensor of a dtype of safetensors, got .* complex128",
        ),
        (
            {"model": {"a": torch.eye(2).to_sparse()}},
            TypeError,
            r"model\['a'\] must be a dense tensor .* got torch.sparse_coo float32",
        ),
        (
            {"model": {"a": torch.ones(1, device="meta")}},
            TypeError,
            r"model\['a'\] must be a dense tensor .* got meta",
        ),
    ],
    ids=[
        "negative step",
        "float step",
        "bool cycle",
        "metric",
        "huge metric",
        "entry",
        "model",
        "name",
        "dtype",
        "sparse",
        "meta",
    ],
)
def test_refused_saves(tmp_path, place, arguments, error, match):
    (state,) = states(1)
    place.save(small_model(), step=10, cycle=0)
    before, files = tuple(place), list(tmp_path.rglob("*.*"))
    waits = ({}, {"wait": False}) if isinstance(place, SnapshotStore) else ({},)
    for wait in waits:
        with pytest.raises(error, match=match):
            place.save(**{"model": state, "step": 99, "cycle": 9, **arguments, **wait})
    assert tuple(place) == before
    assert list(tmp_path.rglob("*.*")) == files


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
    for wait in (True, False):
        with pytest.raises(SnapshotError, match=r"the model to be saved in .* is of another model"):
            store.save(other, step=99, cycle=9, wait=wait)
    assert_same_state(other.state_dict(), before)
    assert [s.step for s in store] == [10, 20, 30]


def sticky_chain(count=4):
    """State dicts, each with one more layer that is as in the one before."""
    model = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(31, 31 + count)))
    chain = []
    for frozen in range(count):
        with torch.no_grad():
            for layer in model[frozen:]:
                layer.weight.normal_()
                layer.bias.normal_()
        chain.append(copy.deepcopy(model.state_dict()))
    return chain


def test_a_shared_prefix_is_stored_once(tmp_path):
    chain = sticky_chain()
    store = SnapshotStore(tmp_path)
    for i, state in enumerate(chain):
        before = bytes_in(tmp_path)
        store.save(state, step=i, cycle=i)
        layers = range(i, len(chain)) if i else range(len(chain))
        new = tensor_bytes(state[f"{k}.{what}"] for k in layers for what in ("weight", "bias"))
        assert bytes_in(tmp_path) - before == new
    assert len(tensors_in(tmp_path)) == len({content_hash(t) for s in chain for t in s.values()})
    assert store.bytes_on_disk == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert store.bytes_on_disk < 0.8 * tensor_bytes(t for state in chain for t in state.values())
    for snapshot, state in zip(SnapshotStore(tmp_path), chain, strict=True):
        assert_same_state(store.load(snapshot), state)


def test_the_manifest_stays_small(tmp_path):
    """Of 600 tensors, a further snapshot that shares all but one adds a few KiB."""
    store = SnapshotStore(tmp_path)
    state = {f"blocks.{i}.conv.weight": torch.full((1,), float(i)) for i in range(600)}
    sizes = []
    for step in range(2):
        state["blocks.599.conv.weight"] = torch.full((1,), -1.0 - step)
        store.save(state, step=step, cycle=0)
        sizes.append((tmp_path / "manifest.json").stat().st_size)
    assert sizes[1] - sizes[0] < 4096


def test_the_first_model_gives_the_order_of_the_tensors(tmp_path):
    store, (first, second) = SnapshotStore(tmp_path), states(2)
    store.save(first, step=1, cycle=0)
    store.save(dict(reversed(second.items())), step=2, cycle=0)
    assert_same_state(store.load(store.last(1)[0]), second)


def test_pruning(place):
    chain = sticky_chain(5)
    snapshots = [place.save(state, step=i, cycle=i) for i, state in enumerate(chain)]
    assert place.prune(keep=place) == ()
    assert place.prune(keep=place.last(4)) == (snapshots[0],)
    place.remove(snapshots[2])
    assert tuple(place) == (snapshots[1], snapshots[3], snapshots[4])
    assert place.prune(keep=iter([snapshots[4], snapshots[1]])) == (snapshots[3],)
    for snapshot, state in zip(place, (chain[1], chain[4]), strict=True):
        assert_same_state(place.load(snapshot), state)
    if isinstance(place, SnapshotStore):
        assert bytes_in(place.directory) == distinct_bytes(chain[1], chain[4])
        assert place.bytes_on_disk == sum(p.stat().st_size for p in place.directory.iterdir())
    for gone in (snapshots[0], snapshots[2], snapshots[3]):
        for act in (place.load, place.remove, lambda s: place.prune(keep=[s])):
            with pytest.raises(SnapshotError, match="is not in"):
                act(gone)
    assert len(place) == 2
    place.prune(keep=[])
    assert list(place) == []
    place.save({"another": torch.ones(1)}, step=0, cycle=0)
    assert len(place) == 1


def test_refused_pruning(place):
    place.save(small_model(), step=1, cycle=0)
    with pytest.raises(TypeError, match="snapshot must be a Snapshot, got 3"):
        place.prune(keep=[3])
    assert len(place) == 1


def test_a_replaced_snapshot_is_not_taken_for_the_new_one(place):
    first, second = states(2)
    old = place.save(first, step=1, cycle=0)
    new = place.save(second, step=1, cycle=0)
    assert_same_state(place.load(new), second)
    with pytest.raises(SnapshotError, match="is not in"):
        place.load(old)


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


def test_memory_shares_what_is_equal():
    chain, memory = sticky_chain(), MemorySnapshots()
    for i, state in enumerate(chain):
        memory.save(state, step=i, cycle=i)
    kept = [held for _, held in memory._states]
    for i in range(1, len(chain)):
        shared = {name for name in kept[i] if kept[i][name] is kept[i - 1][name]}
        assert shared == {f"{k}.{what}" for k in range(i) for what in ("weight", "bias")}


def test_memory_is_not_changed_from_outside():
    model, memory = small_model(), MemorySnapshots("cpu")
    expected = copy.deepcopy(model.state_dict())
    snapshot = memory.save(model, step=0, cycle=0)
    other = small_model()
    memory.load_into(other, snapshot)
    for changed in (model.state_dict(), memory.load(snapshot), other.state_dict()):
        for tensor in changed.values():
            tensor.zero_()
    assert_same_state(memory.load(snapshot), expected)
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
    memories = [MemorySnapshots(), MemorySnapshots("cuda"), MemorySnapshots("cpu")]
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


def test_a_damaged_snapshot_is_never_loaded(tmp_path):
    store, (expected,) = filled_store(tmp_path, 1)
    (snapshot,) = store
    path = file_of(tmp_path, expected["0.weight"])
    good = path.read_bytes()
    loaded = store.load(snapshot)
    header = 8 + int.from_bytes(good[:8], "little")
    random_ = random.Random(0)
    refused = rf"{path.name} is truncated or altered, at '"
    for _ in range(200):
        damaged = bytearray(good)
        at = random_.randrange(len(good))
        damaged[at] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with (
            contextlib.suppress(SnapshotError)
            if at < header
            else pytest.raises(SnapshotError, match=refused)
        ):
            assert_same_state(store.load(snapshot), expected)
    for size in (0, 7, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(SnapshotError, match=refused):
            store.load(snapshot)
    path.unlink()
    with pytest.raises(SnapshotError, match=rf"{path.name} cannot be read, it holds '0.weight'"):
        store.load(snapshot)
    path.write_bytes(good)
    assert_same_state(store.load(snapshot), expected)
    os.truncate(path, 0)
    path.write_bytes(b"x" * len(good))
    assert_same_state(loaded, expected)  # not a view of the file


def rot(path):
    """Change a tensor in its file, which keeps its size and its header."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:begin] + bytes(b ^ 1 for b in data[begin:]))


def move_out(path):
    """As an archive might bring it: a link out of the store."""
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


LOSSES = {"gone": Path.unlink, "cut": lambda p: os.truncate(p, 99), "rotten": rot, "link": move_out}


@pytest.mark.parametrize("damage", LOSSES.values(), ids=LOSSES)
def test_a_lost_tensor_is_written_again(tmp_path, damage):
    """When it is saved again. Until then all that hold it are refused, and can be removed."""
    chain, tmp_path = sticky_chain(3), tmp_path / "store"
    store = SnapshotStore(tmp_path)
    first, second = (store.save(state, step=i, cycle=i) for i, state in enumerate(chain[:2]))
    damage(file_of(tmp_path, chain[0]["0.weight"]))  # which all have in common
    for snapshot in (first, second):
        with pytest.raises(
            SnapshotError, match=r"tensor-\w+\.safe.* (cannot be|is truncated).*'0.w"
        ):
            store.load(snapshot)
    store.remove(first)
    assert tuple(store) == (second,)
    third = store.save(chain[2], step=2, cycle=2)
    for snapshot, state in zip((second, third), chain[1:], strict=True):
        assert_same_state(store.load(snapshot), state)
    store.remove(second)
    assert bytes_in(tmp_path) == distinct_bytes(chain[2])


def offsets(*found):
    """Have each tensor there."""

    def forge(header):
        return {name: {**entry, "data_offsets": list(found)} for name, entry in header.items()}

    return forge


FORGED_HEADERS = {
    "a list": lambda header: [header],
    "nothing": lambda header: {},
    "no places": lambda header: {name: {} for name in header},
    "beyond the end": offsets(10**6, 10**6 + 24),
    "huge": offsets(0, 2**70),
    "negative": offsets(-24, 0),
    "backwards": offsets(24, 0),
    "one number": offsets(0),
    "floats": offsets(0.0, 24.0),
    "all in one place": offsets(0, 24),
    "deep": lambda header: json.loads("[" * 500 + "]" * 500),
}


@pytest.mark.parametrize("forge", FORGED_HEADERS.values(), ids=FORGED_HEADERS)
def test_a_forged_header_is_refused(tmp_path, forge):
    store, saved = filled_store(tmp_path, 1)
    path, (snapshot,) = file_of(tmp_path, saved[0]["0.weight"]), store
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(forge(json.loads(data[8:begin]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[begin:])
    with pytest.raises(
        SnapshotError, match=rf"{path.name} is truncated or altered, at '0\.weight'"
    ):
        store.load(snapshot)
    again = store.save(saved[0], step=10, cycle=0)
    assert_same_state(store.load(again), saved[0])


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1], ids=str)
def test_a_forged_length_of_a_header_is_refused(tmp_path, length):
    store, saved = filled_store(tmp_path, 1)
    path, (snapshot,) = file_of(tmp_path, saved[0]["0.weight"]), store
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(
        SnapshotError, match=rf"{path.name} is truncated or altered, at '0\.weight'"
    ):
        store.load(snapshot)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store whose snapshots share tensors, and what is in it, by step."""
    directory = tmp_path_factory.mktemp("template")
    store, chain = SnapshotStore(directory), sticky_chain(3)
    for i, state in enumerate(chain):
        store.save(state, step=i, cycle=i, metrics={"loss": 0.5 - i})
    return directory, dict(enumerate(chain))


def flip(files, i, at, other):
    data = bytearray(files[i].read_bytes())
    if data:
        data[at % len(data)] = other
    files[i].write_bytes(data)


def insert(files, i, at, data):
    old = files[i].read_bytes()
    at %= len(old) + 1
    files[i].write_bytes(old[:at] + data + old[at:])


def cut(files, i, at, count):
    old = files[i].read_bytes()
    at %= len(old) + 1
    files[i].write_bytes(old[:at] + old[at + count :])


def swap(files, i, other):
    a, b = files[i], files[other % len(files)]
    old = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(old)


def delete(files, i):
    files[i].unlink()


NUMBERS = st.integers(0, 10**6)
DAMAGE = st.one_of(
    st.tuples(st.just(flip), NUMBERS, NUMBERS, st.integers(0, 255)),
    st.tuples(st.just(flip), NUMBERS, st.integers(0, 400), st.integers(0, 255)),  # in a header
    st.tuples(st.just(insert), NUMBERS, NUMBERS, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just(cut), NUMBERS, NUMBERS, st.sampled_from([1, 4, 8, 10**6])),
    st.tuples(st.just(swap), NUMBERS, NUMBERS),
    st.tuples(st.just(delete), NUMBERS),
)


@settings(max_examples=150)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_whatever_happens_to_the_files_no_wrong_weights_are_loaded(template, damages):
    directory, saved = template
    with tempfile.TemporaryDirectory() as copied:
        shutil.copytree(directory, copied, dirs_exist_ok=True)
        for damage, which, *arguments in damages:
            files = sorted(Path(copied).iterdir())
            if files:
                damage(files, which % len(files), *arguments)
        check_never_wrong(Path(copied), saved)


def check_never_wrong(directory, saved):
    """Every snapshot is what was saved, or refused; how many were loaded."""
    loaded = 0
    with contextlib.suppress(SnapshotError):
        store = SnapshotStore(directory)
        for snapshot in store:
            with contextlib.suppress(SnapshotError):
                assert_same_state(store.load(snapshot), saved[snapshot.step])
                loaded += 1
    return loaded


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def places_in(value, path=()):
    """Where each number, text and None is, and each list and object."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*path, key))


def test_every_edit_of_the_manifest_is_refused(tmp_path, template):
    shutil.copytree(template[0], tmp_path, dirs_exist_ok=True)
    good = manifest_of(tmp_path)
    places = list(places_in(good))
    assert len(places) > 80
    for path in places:
        for edit in ("change", "remove"):
            content = copy.deepcopy(good)
            holder = content
            for key in path[:-1]:
                holder = holder[key]
            if edit == "remove":
                del holder[path[-1]]
            else:
                old = holder[path[-1]]
                holder[path[-1]] = old + 1 if isinstance(old, int | float) else "other"
            (tmp_path / "manifest.json").write_text(json.dumps(content))
            with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of"):
                SnapshotStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(good, indent=2))
    assert check_never_wrong(tmp_path, template[1]) == 3


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
    assert noticed > 380


def forged(content):
    """With the right checksum."""
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k != "checksum"}
        text = json.dumps(content, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(content)


def edited(entry=None, tensor=None, **top):
    def edit(content):
        content.update(top)
        for key, change in (("snapshots", entry), ("tensors", tensor)):
            if change:
                content[key][0].update(change)
        return content

    return edit


def swapped(content):
    rows = content["snapshots"][0]["tensors"]
    rows[0], rows[1] = rows[1], rows[0]
    return content


def metric(value):
    return edited({"metrics": {"loss": value}})


OLD = r"format_version must be 3, got "
BAD_MANIFESTS = {  # what is forged in, and the field that is named
    "a list": (lambda content: [content], r"it must be of type dict, got \[{"),
    "null": (lambda content: None, "it must be of type dict, got None"),
    "the version before": (edited(format_version=2), OLD + "2"),
    "future version": (edited(format_version=4), OLD + "4"),
    "a version like ours": (edited(format_version=3.0), "format_version must be of type int"),
    "no version": (lambda c: {k: v for k, v in c.items() if k != "format_version"}, OLD + "None"),
    "another field": (edited(more=1), "it must have the fields format_version, tensors"),
    "no tensors": (edited(tensors=[]), r"snapshots\[0\].sha256 must be that of"),
    "a tensor as list": (edited(tensors=[[]]), r"tensors\[0\] must be of type dict, got \[\]"),
    "a dtype of another kind": (edited(tensor={"dtype": "nn"}), r"tensors\[0\].dtype must be the"),
    "another word for it": (edited(tensor={"dtype": "float"}), r"tensors\[0\].dtype must be the"),
    "a layout for a dtype": (edited(tensor={"dtype": "strided"}), r"tensors\[0\].dtype must be"),
    "a huge shape": (edited(tensor={"shape": [10**30]}), r"tensors\[0\].shape .*, got \[10000"),
    "a huge product": (edited(tensor={"shape": [2**40, 2**40]}), r"tensors\[0\].shape must be"),
    "a huge empty shape": (edited(tensor={"shape": [0, 2**64]}), r"tensors\[0\].shape must be"),
    "a negative size": (edited(tensor={"shape": [-6, -4]}), r"tensors\[0\].shape must be sizes"),
    "a size as float": (edited(tensor={"shape": [6.0, 4]}), r"tensors\[0\].shape must be sizes"),
    "a size as bool": (edited(tensor={"shape": [True, 24]}), r"tensors\[0\].shape must be sizes"),
    "a name as number": (edited(tensor={"name": 1}), r"tensors\[0\].name must be of type str"),
    "twice the same name": (
        edited(tensor={"name": "0.bias"}),
        r"tensors\[1\].name must differ from the others, got '0.bias'",
    ),
    "no snapshots": (edited(snapshots=3), "snapshots must be of type list, got 3"),
    "a snapshot as list": (edited(snapshots=[[]]), r"snapshots\[0\] must be of type dict"),
    "escaping path": (edited(hashes=["../../etc/passwd"]), r"hashes\[0\] must be 64 hexadecimal"),
    "a longer hash": (edited(hashes=["0" * 65]), r"hashes\[0\] must be 64 hex"),
    "hash as number": (edited(hashes=[5]), r"hashes\[0\] must be 64 hexadecimal digits, got 5"),
    "hashes as text": (edited(hashes="0" * 64), "hashes must be of type list"),
    "no hashes": (edited(hashes=[]), r"snapshots\[0\].tensors must be positions among 0 hashes"),
    "other hashes": (edited(hashes=["0" * 64] * 99), r"snapshots\[0\].sha256 must be that of"),
    "two tensors for each other": (swapped, r"snapshots\[0\].sha256 must be that of"),
    "a tensor too few": (edited({"tensors": [0]}), r"snapshots\[0\].sha256 must be that of"),
    "a tensor beyond": (edited({"tensors": [10**6]}), r"snapshots\[0\].tensors must be positions"),
    "a tensor from the end": (edited({"tensors": [-1]}), r"snapshots\[0\].tensors must be posit"),
    "negative step": (edited({"step": -1}), r"snapshots\[0\].step must be >= 0, got -1"),
    "step as text": (edited({"step": "10"}), r"snapshots\[0\].step must be of type int"),
    "step not a number": (edited({"step": math.nan}), r"snapshots\[0\].step must be of type int"),
    "cycle as bool": (edited({"cycle": True}), r"snapshots\[0\].cycle must be of type int"),
    "time as number": (edited({"time": 5}), r"snapshots\[0\].time must be of type str, got 5"),
    "sha256 as number": (edited({"sha256": 5}), r"snapshots\[0\].sha256 must be of type str"),
    "metrics as list": (edited({"metrics": [1]}), r"snapshots\[0\].metrics must be of type dict"),
    "metric as text": (metric("1"), r"snapshots\[0\].metrics\['loss'\] must be of type float"),
    "a huge metric": (metric(10**400), r"snapshots\[0\].metrics\['loss'\] must be of type float"),
    "unknown entry": (edited({"pickle": "x"}), r"snapshots\[0\] must have the fields step, cycle"),
    "twice the same step": (
        lambda c: {**c, "snapshots": [*c["snapshots"], dict(c["snapshots"][0])]},
        "snapshots must have steps that rise",
    ),
}


@pytest.mark.parametrize(("edit", "match"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, edit, match):
    filled_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(forged(manifest_of(tmp_path)))
    SnapshotStore(tmp_path)
    path.write_text(forged(edit(manifest_of(tmp_path))))
    with pytest.raises(
        SnapshotError, match=rf"(?s)manifest\.json is not a manifest of snapshots: .*({match})"
    ):
        SnapshotStore(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a":' * 100_000, "\xff\xfe", '{"a": 1, "a": 1}', "9" * 10_000],
    ids=["", "{", "[[[", "{{{", "bytes", "repeated", "digits"],
)
def test_a_manifest_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
        SnapshotStore(tmp_path)


def linked(path, outside):
    path.rename(outside)
    path.symlink_to(outside)


def in_its_place(make):
    def replaced(path, outside):
        path.unlink()
        make(path)

    return replaced


PLACES = {
    "link": (linked, "a symbolic link, which might lead anywhere, is not followed"),
    "broken link": (in_its_place(lambda p: p.symlink_to("nowhere")), "a symbolic link, which"),
    "directory": (in_its_place(Path.mkdir), "not a file"),
    "pipe": (in_its_place(os.mkfifo), "not a file"),
}


@pytest.mark.parametrize(("replace", "match"), PLACES.values(), ids=PLACES)
def test_a_manifest_that_is_no_file_is_neither_read_nor_replaced(tmp_path, replace, match):
    directory, outside = tmp_path / "store", tmp_path / "outside"
    store, saved = filled_store(directory)
    replace(directory / "manifest.json", outside)
    before = sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for act in (
        lambda: SnapshotStore(directory),
        lambda: store.save(saved[0], step=99, cycle=9),
        lambda: store.prune(keep=[]),
    ):
        with pytest.raises(SnapshotError, match=rf"manifest\.json cannot be read: .*{match}"):
            act()
    assert sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_snapshot_made_up_by_hand_is_refused(tmp_path):
    store, _ = filled_store(tmp_path)
    for made_up in (Snapshot(10, 0, {}, "", "/../../a"), Snapshot(10, 0, {}, "")):
        with pytest.raises(SnapshotError, match="is not in SnapshotStore"):
            store.load(made_up)
    with pytest.raises(TypeError, match="snapshot must be a Snapshot, got 10"):
        store.load(10)


def test_a_signature_that_is_not_the_tensors_is_refused(tmp_path):
    """All hashes are right."""
    store, _ = filled_store(tmp_path, 1)
    content = manifest_of(tmp_path)
    content["tensors"][0]["shape"] = [4, 6]
    (tmp_path / "manifest.json").write_text(forged(content))
    with pytest.raises(
        SnapshotError, match=r"at '0.weight': it holds a float32 \[6, 4\], not a .* \[4, 6"
    ):
        store.load(store.last(1)[0])


def test_leftovers_are_ignored_and_removed_on_the_next_save(tmp_path):
    store, saved = filled_store(tmp_path, 1)
    leftovers = [
        tmp_path / f"tensor-{'0' * 64}.safetensors",
        tmp_path / f".fastfreeze-{'0' * 16}.tmp",
    ]
    directories = [
        tmp_path / f"tensor-{'1' * 64}.safetensors",
        tmp_path / f".fastfreeze-{'1' * 16}.tmp",
    ]
    foreign = [tmp_path / "model.safetensors", tmp_path / "notes.tmp", *directories]
    for path in directories:
        path.mkdir()
    for path in leftovers + foreign[:2]:
        path.write_bytes(b"x")
    assert len(SnapshotStore(tmp_path)) == 1
    store.save(saved[0], step=20, cycle=1)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign)
    assert len(store) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_manifest_is_not_an_empty_store(tmp_path, count):
    store, saved = filled_store(tmp_path, count)
    (tmp_path / "manifest.json").unlink()
    before = files_in(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"manifest\.json is missing, though there are snapshots"
    ):
        SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        store.save(saved[0], step=99, cycle=9)
    assert files_in(tmp_path) == before


def full_disk(_):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store, saved = filled_store(tmp_path)
    before = files_in(tmp_path)
    (new,) = states(1)
    monkeypatch.setattr("fastfreeze.files.os.fsync", full_disk)
    for act in (
        lambda: store.save(saved[0], step=20, cycle=1),
        lambda: store.save(new, step=20, cycle=1),
        lambda: store.prune(keep=store.last(1)),
    ):
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
    """Before and after each file that saves, replaced snapshots and prunes write."""
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
        steps = [s.step for s in store]
        if "pruned" in done:
            assert steps in ([0, 1, 2], [1, 2])
        else:
            assert steps[: len(done)] == done
        for snapshot in store:
            expected = [chain[snapshot.step]] + [chain[0]] * (snapshot.step not in done)
            assert raw_state(store.load(snapshot)) in map(raw_state, expected)
        run(store, [])  # nothing stands in the way of another run
        assert [s.step for s in store] == [1, 2]
        assert bytes_in(directory) == distinct_bytes(*chain[1:])
        if "all" in done:
            break
    assert stop_at > 12


def raw_state(state):
    return {name: raw(t) for name, t in state.items()}


def killed_state(step, draft=False):
    """Some layers stay for six steps, some are tied."""
    weight = torch.full((5_000,), step + 0.5 * draft)
    frozen = torch.full((2_000,), float(step // 6))
    return {"frozen": frozen, "weight": weight, "tied": weight, "steps": torch.tensor(step)}


def save_for_ever(directory, told):
    """Every fifth save is of a draft first; told are steps that are safe, and what is pruned."""
    store = SnapshotStore(directory)
    first = max((s.step for s in store), default=0)  # which may be a draft
    for step in itertools.count(first):
        if step % 5 == 1 and step != first:
            store.save(killed_state(step, draft=True), step=step, cycle=0, wait=False)
        later = step % 3 != 0
        store.save(killed_state(step), step=step, cycle=step // 6, wait=not later)
        if step % 5 == 4:
            store.flush()
            told.send(("saved", step))
            told.send(("pruning", step - 3))
            store.prune(keep=tuple(store)[-4:])
        elif not later:
            told.send(("saved", step))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_all_completed_snapshots_are_intact(tmp_path, kills):
    context = multiprocessing.get_context("fork")
    random_ = random.Random(0)
    reached = {"saved": -1, "pruning": 0}
    for _ in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=save_for_ever, args=(tmp_path, sender), daemon=True)
        writer.start()
        sender.close()
        try:
            before = reached["saved"]
            while reached["saved"] == before:
                assert receiver.poll(60)
                reached.update([receiver.recv()])
            kill_at = time.monotonic() + random_.random() * 0.04
            while time.monotonic() < kill_at:
                SnapshotStore(tmp_path)  # a reader never meets half a manifest
        finally:
            writer.kill()
            writer.join(60)
        with contextlib.suppress(EOFError):
            while True:
                reached.update([receiver.recv()])
        store = SnapshotStore(tmp_path)
        steps = [s.step for s in store]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert steps[0] <= reached["pruning"]
        assert steps[-1] >= reached["saved"]
        for snapshot in store:
            found = raw_state(store.load(snapshot))
            may_be_draft = snapshot.step > reached["saved"]
            assert found == raw_state(killed_state(snapshot.step)) or (
                may_be_draft and found == raw_state(killed_state(snapshot.step, draft=True))
            )
    assert reached["saved"] >= kills - 1


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
    for snapshot, i in zip(store, (2, 4, 5), strict=True):
        assert_same_state(store.load(snapshot), saved[i])


def test_a_second_copy_is_made_only_when_the_first_is_written(tmp_path, held_back):
    store, saved = SnapshotStore(tmp_path), states(2)
    store.save(saved[0], step=0, cycle=0, wait=False)
    second = threading.Thread(
        target=store.save, args=(saved[1],), kwargs={"step": 1, "cycle": 0, "wait": False}
    )
    second.start()
    second.join(0.2)
    assert second.is_alive()
    held_back.set()
    second.join()
    assert [s.step for s in store] == [0, 1]
    for snapshot, state in zip(store, saved, strict=True):
        assert_same_state(store.load(snapshot), state)


NEXT_CALLS = {
    "flush": lambda store, snapshot: store.flush(),
    "save": lambda store, snapshot: store.save(small_model(), step=50, cycle=5),
    "iter": lambda store, snapshot: list(store),
    "len": lambda store, snapshot: len(store),
    "last": lambda store, snapshot: store.last(1),
    "load": lambda store, snapshot: store.load(snapshot),
    "load_into": lambda store, snapshot: store.load_into(small_model(), snapshot),
    "export": lambda store, snapshot: store.export(snapshot, "never written"),
    "remove": lambda store, snapshot: store.remove(snapshot),
    "prune": lambda store, snapshot: store.prune(keep=[]),
    "bytes_on_disk": lambda store, snapshot: store.bytes_on_disk,
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


def test_a_save_that_does_not_wait_raises_for_the_one_before(tmp_path, monkeypatch):
    store, _ = filled_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fastfreeze.files.os.fsync", full_disk)
        store.save(small_model(), step=40, cycle=4, wait=False)
        store._background._calls[0].join()
        with pytest.raises(OSError, match="No space left"):
            store.save(small_model(), step=50, cycle=5, wait=False)
    store.save(small_model(), step=40, cycle=4, wait=False)
    assert [s.step for s in store] == [10, 20, 30, 40]


def test_many_threads(tmp_path):
    store, saved = SnapshotStore(tmp_path), states(24)
    errors = []

    def work(first):
        try:
            for step in range(first, 24, 4):
                store.save(saved[step], step=step, cycle=0, wait=step % 3 == 0)
                for snapshot in store:
                    assert_same_state(store.load(snapshot), saved[snapshot.step])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [s.step for s in store] == list(range(24))
    for snapshot in store:
        assert_same_state(store.load(snapshot), saved[snapshot.step])


def loads_if_there(store, snapshot, expected):
    """Whether it is still there; it must not be damaged."""
    try:
        state = store.load(snapshot)
    except SnapshotError as error:
        if "is not in" not in str(error):
            raise
        return False
    assert_same_state(state, expected)
    return True


def test_a_reader_beside_a_writer_that_prunes(tmp_path):
    """What is removed while it is read is said to be gone, not damaged."""
    chain = sticky_chain(4)
    writer, reader = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    first = writer.save(chain[1], step=0, cycle=0)
    stop, loads = threading.Event(), 0

    def write():
        for _ in range(10):
            writer.save(chain[2], step=1, cycle=0)
            writer.prune(keep=[first])
            writer.save(chain[3], step=0, cycle=0)
            writer.save(chain[1], step=0, cycle=0)
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not stop.is_set():
        found = [s for s in reader if s.sha256 == first.sha256]
        loads += sum(loads_if_there(reader, snapshot, chain[1]) for snapshot in found)
    thread.join()
    assert loads > 3


def test_a_snapshot_that_is_removed_while_it_is_read_is_gone(tmp_path, monkeypatch):
    chain = sticky_chain(2)
    writer, reader = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    first, second = (writer.save(state, step=i, cycle=i) for i, state in enumerate(chain))

    def read_late(*arguments):
        monkeypatch.setattr(store_module, "read_tensor", read_tensor)
        writer.remove(second)
        return read_tensor(*arguments)

    monkeypatch.setattr(store_module, "read_tensor", read_late)
    with pytest.raises(SnapshotError, match="is not in"):
        reader.load(second)
    assert_same_state(reader.load(first), chain[0])


def test_a_store_that_is_let_go_of_saves_first(tmp_path):
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)
    del store
    gc.collect()
    deadline = time.monotonic() + 20
    while len(SnapshotStore(tmp_path)) == 0:
        assert time.monotonic() < deadline


def test_a_store_that_is_let_go_of_tells_what_went_wrong(tmp_path, monkeypatch, held_back):
    monkeypatch.setattr("fastfreeze.files.os.fsync", full_disk)
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)
    (call,) = store._background._calls
    held_back.set()
    call.join(20)
    del call
    holder = [store]
    del store
    with pytest.warns(FastfreezeWarning, match=r"a snapshot was not saved, .*No space left"):
        holder.clear()


EXITS = """
import sys, threading, time, torch
import fastfreeze.files as files
from fastfreeze import SnapshotStore

fsync = files.os.fsync
full = None

def slow(fd):
    time.sleep(0.1)
    if threading.current_thread() in full._background._calls:
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


def saves_and_waits(directory, told):
    store = SnapshotStore(directory)
    store.save(small_model(), step=1, cycle=0)
    told.send("saved")
    time.sleep(60)


@pytest.mark.parametrize("wait", [True, False])
def test_a_second_process_that_writes_is_refused(tmp_path, wait):
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    writer = multiprocessing.get_context("fork").Process(
        target=saves_and_waits, args=(tmp_path, sender), daemon=True
    )
    writer.start()
    assert receiver.recv() == "saved"
    store, before = SnapshotStore(tmp_path), files_in(tmp_path)
    (snapshot,) = store
    for act in (
        lambda: store.save(small_model(), step=2, cycle=0, wait=wait),
        lambda: store.prune(keep=[]),
        lambda: store.remove(snapshot),
    ):
        with pytest.raises(SnapshotError, match=f"^{tmp_path} is in use by another process"):
            act()
    assert len(store.load(snapshot)) == len(small_model().state_dict())
    assert files_in(tmp_path) == before
    writer.kill()
    writer.join()
    store.save(small_model(), step=2, cycle=0, wait=wait)
    assert [s.step for s in store] == [1, 2]


def saves_as_a_child(store, told):
    try:
        store.save(small_model(), step=9, cycle=0)
    except SnapshotError as error:
        told.send(str(error))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_of_a_writer_is_refused(tmp_path, held_back):
    store = SnapshotStore(tmp_path)
    store.save(small_model(), step=1, cycle=0, wait=False)  # a thread is in the middle of it
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=saves_as_a_child, args=(store, sender), daemon=True
    )
    child.start()
    assert "in use by another process" in receiver.recv()
    child.join()
    held_back.set()
    store.save(small_model(), step=2, cycle=0)
    assert [s.step for s in store] == [1, 2]


@pytest.mark.filterwarnings("ignore:.* holds snapshots of later steps")
def test_stores_of_one_directory_in_one_process_lose_nothing(tmp_path):
    saved = states(16)
    stores = [SnapshotStore(path) for path in (tmp_path, tmp_path / ".." / tmp_path.name)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        done = [
            threads.submit(stores[i % 2].save, state, step=i, cycle=0, wait=i % 3 == 0)
            for i, state in enumerate(saved)
        ]
        for future in done:
            future.result()
    for store in stores:
        store.flush()
    del stores[0]  # the other one still has its turn
    stores[0].prune(keep=stores[0].last(12))
    found = SnapshotStore(tmp_path)
    assert [s.step for s in found] == list(range(4, 16))
    for snapshot in found:
        assert_same_state(found.load(snapshot), saved[snapshot.step])


def test_a_directory_that_is_replaced_while_it_is_in_use(tmp_path):
    directory = tmp_path / "store"
    store, saved = filled_store(directory)
    shutil.rmtree(directory)
    snapshot = store.save(saved[1], step=20, cycle=1)
    assert list(store) == [snapshot]
    assert_same_state(SnapshotStore(directory).load(snapshot), saved[1])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_nothing(tmp_path, held_back):
    store, (state,) = SnapshotStore(tmp_path), states(1)
    store.save(state, step=1, cycle=0, wait=False)
    child = multiprocessing.get_context("fork").Process(target=store.flush, daemon=True)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    held_back.set()
    assert len(store) == 1


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="file must be a directory"):
        SnapshotStore(tmp_path / "file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapshotStore(3), "directory must be a path, got 3"),
        (lambda: SnapshotStore(None), "directory must be a path, got None"),
        (lambda: MemorySnapshots(3), "device must be a torch.device, a string or None, got 3"),
    ],
    ids=["number for a directory", "no directory", "number for a device"],
)
def test_places_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_relative_store_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = SnapshotStore("store")
    store.save(small_model(), step=1, cycle=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(store) == 1
