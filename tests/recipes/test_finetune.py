"""``fastfreeze finetune``: weights from a file, four recipes, the best epoch, a killed run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastfreeze.ensemble import PredictionScores
from fastfreeze.recipes import runs
from fastfreeze.recipes.data import load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.networks import build_network
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.recipes.training import predict
from tests.commands import assert_same_lines, invoke, why, work_in, write_pictures
from tests.killed import untimed

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = pytest.mark.train

OWN = """
from torch import nn

def block(inputs):
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())

def make(outputs=2):
    return nn.Sequential(
        block(3), block(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, outputs)
    )
"""


# In a process of its own: torch computes no gradients in the fork of one that has compiled.
STOPS_IN_THE_SECOND_EPOCH = """
import time
from fastfreeze.cli import main
from fastfreeze.recipes.rundir import RunDir

log = RunDir.log

def stopped(self, line):
    log(self, line)
    if line.get("epoch") == 2:
        print("there", flush=True)
        time.sleep(60)

RunDir.log = stopped
main()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a module, images, and weights for seven classes in both formats."""
    work_in(tmp_path, monkeypatch, tune_own=OWN)
    write_pictures(tmp_path / "images", train=10)
    torch.manual_seed(5)
    weights = build_network("tune_own:make").state_dict()
    weights["4.weight"], weights["4.bias"] = torch.randn(7, 16), torch.randn(7)
    torch.save(weights, "weights.pth")
    safetensors.torch.save_file(weights, "weights.safetensors")
    return weights


def arguments(*more, run="run", weights="weights.pth"):
    fixed = "--image-size 8 --model tune_own:make --batch-size 8 --threads 1 --data-dir images"
    short = f"--epochs 3 --validation 0.2 --weights {weights} --run-dir {run} --json"
    recipe = [] if any("recipe" in option for option in more) else ["--until=1"]
    return ["finetune", *fixed.split(), *short.split(), *recipe, *more]


def tuned(*more, **where):
    return invoke(*arguments(*more, **where))


def results_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["results"]


RECIPES = {  # options, whether the first layer trains, what is frozen at the end
    "prefix-adamw": (("--recipe=prefix", "--until=1", "--warmup-steps=3"), False, [0]),
    "prefix-sgd": (("--recipe=prefix", "--until=1", "--optimizer=sgd", "--augment"), False, [0]),
    "gradual-adamw": (("--recipe=gradual",), True, []),
    "gradual-sgd": (("--recipe=gradual", "--optimizer=sgd"), True, []),
    "freezeout-adamw": (("--recipe=freezeout", "--t0=0.5"), True, [0, 1]),
    "freezeout-sgd": (("--recipe=freezeout", "--t0=0.5", "--optimizer=sgd"), True, [0, 1]),
    "full-adamw": (("--recipe=full", "--warmup-steps=3"), True, []),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("prefix-adamw", "freezeout-sgd") else TRAIN)
        for name in RECIPES
    ],
)
def test_a_recipe_trains_and_its_best_epoch_is_kept(own, name):
    options, first_trains, frozen = RECIPES[name]
    result = tuned(*options)
    [found] = results_of(result)
    run = RunDir.open(Path("run"))
    start, *epochs = (line for line in run.metrics() if line["event"] in ("start", "epoch"))
    scores = [(line["validation_error"], line["validation_nll"]) for line in epochs]
    assert found["validation_error"] == min(scores)[0]
    assert found["best_epoch"] == 1 + scores.index(min(scores))
    assert found["backward_removed"] < 1
    assert (found["backward_removed"] > 0) == (name != "full-adamw")
    assert epochs[-1]["frozen_layers"] == frozen
    assert len(start["layers"]) == len(epochs[0]["lr"]) == 3
    recipe = found["method"]
    checkpoint = run.load_checkpoint(f"{recipe}-seed0")
    weights = checkpoint["model"]
    assert torch.equal(weights["0.0.weight"], own["0.0.weight"]) != first_trains
    assert torch.equal(weights["0.1.running_mean"], own["0.1.running_mean"]) != first_trains
    assert not torch.equal(weights["1.0.weight"], own["1.0.weight"])
    assert weights["4.weight"].shape == (2, 16)
    best = torch.load(f"run/best-{recipe}-seed0.pth")
    torch.testing.assert_close(best, checkpoint["best"]["weights"], rtol=0, atol=0)
    cached = name == "prefix-adamw"
    assert ("feature cache" in result.stderr) == cached
    assert ("% of the images came from the feature cache" in result.stderr) == cached
    assert Path("run/table.txt").read_text().startswith("recipe ")
    assert Path("run/classes.txt").read_text() == "dark\nlight\n"
    assert invoke("plot", "run").exit_code == 0


def test_the_result_is_the_best_epochs_on_the_test_images(own, monkeypatch):
    worse = iter([(0.0, 2.0), (0.0, 1.0), (0.5, 0.5), (0.5, 0.5)])  # each epoch's, then the test's
    scores = lambda *_: PredictionScores(*next(worse), 0.0, 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr(runs, "prediction_scores", scores)
    seen = []

    def predicting(model, data, device):
        copies = {key: value.clone() for key, value in model.state_dict().items()}
        seen.append((copies, len(data.test.labels)))
        return predict(model, data, device)

    monkeypatch.setattr(runs, "predict", predicting)
    [found] = results_of(tuned("--quiet"))
    assert (found["best_epoch"], found["validation_error"], found["error"]) == (2, 0.0, 0.5)
    assert [count for _, count in seen] == [4, 4, 4, 8]
    torch.testing.assert_close(seen[3][0], seen[1][0], rtol=0, atol=0)
    assert not torch.equal(seen[3][0]["1.0.weight"], seen[2][0]["1.0.weight"])


@TRAIN
@pytest.mark.parametrize("name", ["prefix-adamw", "gradual-adamw", "freezeout-sgd"])
def test_a_killed_run_ends_as_one_that_was_not(own, name):
    options, *_ = RECIPES[name]
    assert tuned(*options, "--quiet", run="whole").exit_code == 0

    command = [sys.executable, "-c", STOPS_IN_THE_SECOND_EPOCH, *arguments(*options, "--quiet")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        process.kill()
    resumed = invoke("finetune", "--resume", "run", "--quiet")
    assert resumed.exit_code == 0, resumed.output
    found, expected = RunDir.open(Path("run")), RunDir.open(Path("whole"))
    assert_same_lines(found, expected)
    run = f"{options[0].partition('=')[2]}-seed0"
    states = [each.load_checkpoint(run) for each in (found, expected)]
    parts = [(s["model"], s["best"], s["optimizer"]["state"]) for s in states]
    torch.testing.assert_close(*parts, rtol=0, atol=0)


def test_weights_of_safetensors_and_of_old_files_are_the_same(own):
    old = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, "old.pth")
    first, *others = (
        untimed(results_of(tuned("--quiet", "--epochs=1", run=f"run-{weights}", weights=weights)))
        for weights in ("weights.pth", "weights.safetensors", "old.pth")
    )
    assert others == [first] * 2


BAD_WEIGHTS = {
    "wrapped": (
        lambda w: [w.update({f"module.{key}": w.pop(key)}) for key in list(w)],
        "(all names begin with module.: it is of a wrapped network)",
    ),
    "lacks": (lambda w: w.pop("1.0.weight"), "(but for its head, 4, which is new): it lacks 1.0.w"),
    "besides": (lambda w: w.update({"4x": torch.ones(1)}), "it has besides 4x"),
    "shape": (lambda w: w.update({"0.1.bias": torch.ones(5)}), "0.1.bias is [5] and must be [4]"),
    "nested": (
        lambda w: w.update(optimizer={"lr": 1}),
        "must hold a state dict, a tensor by each name: TypeError: got dict by 'optimizer'",
    ),
    "pickled": (
        lambda w: w.update(run=Path("x")),
        "bad.pth, which must hold a state dict, a tensor by each name: UnpicklingError: Weights "
        "only load failed\n",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_told_before_the_first_step(own, name):
    change, message = BAD_WEIGHTS[name]
    change(own)
    torch.save(own, "bad.pth")
    assert message in why(tuned(weights="bad.pth"))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        ("--weights absent.pth", 1, "cannot read --weights"),
        ("--until 7", 2, "until must be in 1..2, as the head trains, got 7"),
        ("--until nowhere", 2, "until must be one of the layers"),
        ("--until 1 --recipe gradual", 2, "--until is for --recipe prefix"),
        ("--t0 0.5", 2, "--t0 is for --recipe freezeout, and this is --recipe prefix"),
        ("--model torchvision:resnet18", 1, "it lacks"),
        ("--model timm:resnot18", 2, "timm has no network 'resnot18'; try"),
        ("--recipe gradual --batch-size 999 --epochs 1", 2, "gradual starts a layer at a step"),
        ("--warmup-steps 99", 2, "warmup_steps must be in 0..6, got 99"),
    ],
)
def test_what_does_not_fit_is_told(own, options, exit_code, message):
    if "timm:" in options:
        pytest.importorskip("timm")
    result = tuned(*options.split())
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr


def test_weights_are_asked_for(own):
    result = invoke("finetune", "--data-dir", "images", "--model", "torchvision:resnet18")
    assert result.exit_code == 2
    assert "--weights is missing, the file of torchvision:resnet18's" in result.stderr
    no_weights = "finetune --image-size 8 --model tune_own:make --data-dir images --epochs 1"
    result = invoke(*no_weights.split(), "--until", "1", "--run-dir", "run", "--quiet")
    assert result.exit_code == 0, result.output  # a network of one's own brings its weights


def test_held_out_images_are_of_each_class_and_not_varied(own):
    data = load_data("folder", Path("images"), image_size=8)
    parted = data.held_out(0.2)
    assert parted.train.labels.bincount().tolist() == [8, 8]
    assert parted.test.labels.bincount().tolist() == [2, 2]
    assert not set(parted.train.paths) & set(parted.test.paths)
    assert list(data.held_out(0.2).test.paths) == list(parted.test.paths)
    assert data.held_out(0.001).test.labels.bincount().tolist() == [1, 1]
    cpu = torch.device("cpu")
    images, labels = next(iter(parted.unvaried().train_batches(3, 1, 4, cpu)))
    order = parted.train_order(3, 1)[:4].tolist()
    pixels, found = parted.train[order]
    assert torch.equal(labels, found)
    mean, std = parted.mean.view(-1, 1, 1), parted.std.view(-1, 1, 1)
    torch.testing.assert_close(images, (pixels.float() / 255 - mean) / std)
    with pytest.raises(RecipeError, match="the class light has one training image alone"):
        replace(data, train=data.train.part(torch.tensor([0, 1, 10]))).held_out(0.5)
