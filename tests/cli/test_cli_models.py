"""train with networks that are not the papers': torchvision's, and the user's own."""

import json
from pathlib import Path

import pytest
import torch

from fastfreeze import SnapshotEnsemble, SnapshotStore
from fastfreeze.recipes.networks import build_network
from fastfreeze.recipes.rundir import RunDir
from tests.commands import invoke, printed, why, work_in, write_pictures

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = """
import torch
from torch import nn

def make(outputs=2, pool=2):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(4 * pool * pool, outputs),
    )

kept = make()

def keeps():
    return kept

def seven():
    return make(7)

def frozen():
    return make().requires_grad_(False)

def in_pairs():
    return nn.Sequential(make(pool=1)[:7], nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))

class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return (self.net(x), None) if self.training else self.net(x)

def scripted():
    return torch.jit.script(make())

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a module and images, from which the command is started."""
    work_in(tmp_path, monkeypatch, train_own=OWN)
    write_pictures(tmp_path / "images")


def trained(model, *more):
    fixed = "--data folder --data-dir images --image-size 8 --batch-size 8 --threads 1"
    short = "--epochs 3 --cycles 3 --lr 0.05 --run-dir run --quiet"
    return "train", f"--model={model}", *fixed.split(), *short.split(), *more


@pytest.mark.parametrize("model", ["train_own:make", "train_own:keeps"])
def test_own_network_trains_and_resumes(own, model):
    results = printed(*trained(model, "--methods=sgd,both"))["results"]
    assert [r["method"] for r in results] == ["sgd", "both"]
    run = RunDir.open(Path("run"))
    assert run.arguments["model"] == model
    firsts = [line["step_losses"][0] for line in run.metrics() if line.get("epoch") == 1]
    assert firsts == pytest.approx([firsts[0]] * 2, abs=1e-5)  # from the same weights
    (run.path / "results.json").write_text(json.dumps(results[:1]))
    again = printed("train", "--resume", "run", "--quiet")["results"]
    assert [r["ensemble_error"] for r in again] == [r["ensemble_error"] for r in results]
    store = SnapshotStore(run.snapshots("both-seed0"))
    ensemble = SnapshotEnsemble.from_store(build_network(model), store)
    assert ensemble(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


def test_a_network_of_torchvision_trains(own):
    more = ("--methods=both", "--epochs=2", "--cycles=2", "--image-size=24", "--batch-size=4")
    [result] = printed(*trained("torchvision:squeezenet1_1", *more))["results"]
    assert result["backward_removed"] > 0


NUMBERS = "must give a floating-point tensor of the shape [2, 2], a number for each class"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("train_own:seven", f"{NUMBERS}, for a batch of the shape [2, 3, 8, 8]; got torch.fl"),
        ("train_own:Auxiliary", f"{NUMBERS}, for a batch of the shape [2, 3, 8, 8]; got tuple"),
        ("train_own:frozen", "train_own:frozen has no parameter that requires grad"),
        ("train_own:scripted", "train_own:scripted cannot be split with images of the shape"),
        ("train_own:lazy", "train_own:lazy has uninitialised parameters: run it once"),
        ("torchvision:alexnet", "cannot take a batch of the shape [2, 3, 8, 8]: RuntimeError"),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_first_step(own, model, message):
    assert message in why(invoke(*trained(model)))
    assert not Path("run").exists()


def test_the_last_batch_of_an_epoch_counts_too(own):
    in_pairs = trained("train_own:in_pairs", "--methods=sgd", "--epochs=1", "--cycles=1")
    assert invoke(*in_pairs).exit_code == 0
    told = why(invoke(*in_pairs, "--batch-size=5", "--run-dir=other"))
    assert "cannot take a batch of the shape [1, 3, 8, 8]: ValueError: Expected more" in told
