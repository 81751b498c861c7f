"""States and stores that the tests of snapshots fill, and what lies in a store's folder."""

from __future__ import annotations

import copy
import json

import safetensors.torch
import torch
from torch import nn

from fastfreeze.snapshots import SnapshotStore
from fastfreeze.snapshots.tensors import content_hash, tensor_path
from tests.nets import small_model


def states(count):
    return [small_model().state_dict() for _ in range(count)]


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


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_holds(store, saved):
    """These states, in the order of the steps."""
    for snapshot, state in zip(store, saved, strict=True):
        assert_same_state(store.load(snapshot), state)


def filled_store(directory, count=3):
    store, saved = SnapshotStore(directory), states(count)
    for i, state in enumerate(saved):
        store.save(state, step=10 * (i + 1), cycle=i, metrics={"error": 0.1 * i})
    return store, saved


def steps(store):
    return [s.step for s in store]


def raw(tensor):
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.dtype, plain.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_state(state):
    return {name: raw(t) for name, t in state.items()}


def tensors_in(directory):
    return sorted(directory.glob("*.safetensors"))


def file_of(directory, tensor):
    return tensor_path(directory, content_hash(tensor))


def files_in(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


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


def full_disk(_):
    raise OSError(28, "No space left on device")
