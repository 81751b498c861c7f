"""The methods do what they say, and an interrupted run ends as an uninterrupted one."""

import dataclasses
import math
import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastfreeze.layers.split import split
from fastfreeze.recipes import rundir as rundir_module
from fastfreeze.recipes import runs
from fastfreeze.recipes.advice import advice
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.names import METHOD_NAMES
from fastfreeze.recipes.rundir import RunDir, write_atomic
from fastfreeze.recipes.tables import results_table
from fastfreeze.recipes.train import TrainConfig
from fastfreeze.recipes.training import plain_sgd, predict, set_up, train_epoch
from fastfreeze.schedule import Cosine, from_config
from fastfreeze.snapshots import SnapshotStore
from tests.commands import TINY, Killed, assert_same_lines, ran, tiny_data
from tests.killed import alive

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return tiny_data(20, 12)


CONFIG = TrainConfig(**TINY)
TOTAL_STEPS = 12


def train(path, data, say=lambda line: None, **changes):
    return ran(path, data, dataclasses.replace(CONFIG, **changes), say=say)[0]


def network():
    return build_model("resnet8-w4", num_classes=2, in_channels=1)


def dropping():
    """A network that draws random numbers in each step."""
    model = network()
    model.head.layers.insert(2, torch.nn.Dropout(0.5))
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    return train(tmp_path_factory.mktemp("runs") / "run", data)


def weights(run, name):
    return run.load_checkpoint(name)["model"]


def assert_same_run(found, expected):
    assert_same_lines(found, expected)
    for result in expected.results():
        name = f"{result['method']}-seed3"
        a, b = found.load_checkpoint(name), expected.load_checkpoint(name)
        torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
        states = a["optimizer"]["state"], b["optimizer"]["state"]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        stores = (SnapshotStore(run.snapshots(name)) for run in (found, expected))
        hashes = [[(s.step, s.cycle, s.sha256) for s in store] for store in stores]
        assert hashes[0] == hashes[1]


def test_plain_sgd_is_torchs_with_the_cosine(data):
    torch.manual_seed(0)
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    schedule, expected = Cosine(3), []
    setup = plain_sgd(model, schedule, 0.1)
    losses, seconds = train_epoch(setup, data.train_batches(0, 0, 8, CPU), CPU, int)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    optimizer = torch.optim.SGD(twin.parameters(), **options)
    for step, (images, labels) in enumerate(data.train_batches(0, 0, 8, CPU)):
        optimizer.param_groups[0]["lr"] = schedule.lr(step, 0.1)
        optimizer.zero_grad()
        expected.append(F.cross_entropy(twin(images), labels))
        expected[-1].backward()
        optimizer.step()
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-4)
    assert len(seconds) == 3
    assert min(seconds) > 0
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


FINE = {"warm": {"warmup_steps": 4}, "by layer": {"layer_decay": 0.5}, "floor": {"eta_min": 0.01}}


@pytest.mark.parametrize("options", FINE.values(), ids=FINE)
def test_a_setup_follows_all_of_its_schedule(data, options):
    schedule = Cosine(TOTAL_STEPS, **options)
    setup = set_up(network(), schedule, 0.05, data.example(CPU))
    train_epoch(setup, data.train_batches(0, 0, 8, CPU), CPU, int)
    groups = setup.optimizer.param_groups
    rates = [schedule.lr(3, 0.05, i, len(groups)) for i in range(len(groups))]
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_methods_learn_and_tell(finished, data):
    results = {r["method"]: r for r in finished.results()}
    assert list(results) == list(METHOD_NAMES)
    for method, result in results.items():
        lines = [line for line in finished.metrics() if line["method"] == method]
        epochs = [line for line in lines if line["event"] == "epoch"]
        assert [line["step"] for line in epochs] == [3, 6, 9, 12]
        assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
        assert epochs[-1]["train_loss"] == pytest.approx(np.mean(epochs[-1]["step_losses"]), 1e-4)
        assert result["error"] == epochs[-1]["test_error"] < 0.4
        seconds = sum(s for line in epochs for s in line["step_seconds"])
        assert result["seconds"] == pytest.approx(seconds, abs=1e-4)
        assert result["cpu_seconds"] > 0
        members = [line["step"] for line in lines if line["event"] == "snapshot"]
        assert members == ([4, 8, 12] if method in ("snapshot", "both") else [])
        assert (result["ensemble_error"] is None) == (not members)
        assert (result["backward_removed"] > 0) == (method in ("freezeout", "both"))
    firsts = [line["step_losses"][0] for line in finished.metrics() if line.get("epoch") == 1]
    assert firsts == pytest.approx([firsts[0]] * 4, abs=1e-5)  # from the same weights, and images


@pytest.mark.parametrize("method", ["snapshot", "both"])
def test_ensemble_is_of_all_snapshots_and_its_members_are_told(finished, data, method):
    name = f"{method}-seed3"
    store = SnapshotStore(finished.snapshots(name))
    states = [store.load(snapshot) for snapshot in store]
    torch.testing.assert_close(states[-1], weights(finished, name), rtol=0, atol=0)
    model = network()
    probabilities = []
    for state in states:
        model.load_state_dict(state)
        probabilities.append(predict(model, data, CPU).softmax(1))
    mean = torch.stack(probabilities).mean(0)
    result = next(r for r in finished.results() if r["method"] == method)
    labels = data.test.labels
    assert result["ensemble_error"] == (mean.argmax(1) != labels).double().mean().item()
    assert result["nll"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-4)
    *_, rows, _, plan = (finished.path / f"ensemble-{name}.txt").read_text().splitlines()
    assert f"{len(labels)} rows" in rows
    assert "members as one graph" in plan


def test_every_epoch_and_seed_has_images_of_its_own(tmp_path, data, monkeypatch):
    asked = []
    batches = ImageData.train_batches

    def recorded(self, seed, epoch, *rest):
        asked.append((seed, epoch))
        return batches(self, seed, epoch, *rest)

    monkeypatch.setattr(ImageData, "train_batches", recorded)
    train(tmp_path / "run", data, methods=("sgd",), epochs=2, seeds=2)
    assert asked == [(3, 0), (3, 1), (4, 0), (4, 1)]


def test_schedules_layers_and_freezes_are_told(finished, data):
    start, *lines = (line for line in finished.metrics() if line["method"] == "freezeout")
    assert start["event"] == "start"
    assert start["layers"] == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    schedule = from_config(start["schedule"])
    assert schedule == CONFIG.schedule("freezeout", TOTAL_STEPS)
    steps = [schedule.freeze_steps(i, 5)[0] for i in range(4)]
    freezes = [(line["layers"], line["step"]) for line in lines if line["event"] == "freeze"]
    assert freezes == [([i], step) for i, step in enumerate(steps)]
    for line in (line for line in lines if line["event"] == "epoch"):
        expected = [schedule.lr(line["step"], 0.05, i, 5) for i in range(5)]
        assert line["lr"] == pytest.approx(expected)
    told = (finished.path / "freezing-freezeout-seed3.txt").read_text().splitlines()[2:6]
    assert [int(line.split()[0]) for line in told] == steps
    assert not (finished.path / "freezing-sgd-seed3.txt").exists()
    assert weights(finished, "freezeout-seed3")["stem.layers.1.num_batches_tracked"] == steps[0]
    plan = split(network(), data.example(CPU))
    removed = sum(plan.backward_share(i) * (1 - step / TOTAL_STEPS) for i, step in enumerate(steps))
    result = next(r for r in finished.results() if r["method"] == "freezeout")
    assert result["backward_removed"] == pytest.approx(removed)


def test_thawing_layers_are_told(tmp_path, data):
    changes = {"methods": ("both",), "composition": "thaw", "cycles": 2}
    lines = train(tmp_path / "run", data, **changes).metrics()
    thaws = [(line["step"], line["layers"]) for line in lines if line["event"] == "thaw"]
    assert thaws == [(6, [0, 1, 2, 3])]


@pytest.fixture
def writes(monkeypatch):
    """Counts a run's writes in `done`; the one after `allowed` kills it."""
    counted = SimpleNamespace(done=0, allowed=math.inf)

    def crashing(write):
        def wrapped(*args, **kwargs):
            if counted.done == counted.allowed:
                raise Killed
            counted.done += 1
            return write(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(RunDir, "log", crashing(RunDir.log))
    monkeypatch.setattr(SnapshotStore, "save", crashing(SnapshotStore.save))
    for module in (rundir_module, runs):
        monkeypatch.setattr(module, "write_atomic", crashing(write_atomic))
    return counted


@pytest.mark.parametrize("every", [9, pytest.param(2, marks=pytest.mark.train)])
def test_resumes_bit_identical_after_a_crash_between_any_writes(tmp_path, data, writes, every):
    two = {"methods": ("sgd", "both"), "epochs": 2, "model": f"{__name__}:dropping"}
    expected = train(tmp_path / "whole", data, **two)
    total = writes.done
    assert total > 18
    for completed in range(1, total, every):
        writes.done, writes.allowed = 0, completed
        path = tmp_path / str(completed)
        with pytest.raises(Killed):
            train(path, data, **two)
        writes.allowed = math.inf
        assert_same_run(train(path, data, **two), expected)


def test_snapshots_after_the_checkpoint_are_taken_again(tmp_path, monkeypatch, data):
    """They are this run's own: nothing is warned of, and no ensemble has them twice."""
    changes = {"methods": ("snapshot",), "epochs": 1, "cycles": 3}

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_checkpoint", killed)
        with pytest.raises(Killed):
            train(tmp_path / "run", data, **changes)
    store = SnapshotStore(RunDir.open(tmp_path / "run").snapshots("snapshot-seed3"))
    before = [(s.step, s.sha256) for s in store]
    assert len(before) == 3
    train(tmp_path / "run", data, **changes)
    assert [(s.step, s.sha256) for s in store] == before


def test_without_a_terminal_each_tenth_of_a_training_is_told(tmp_path, data):
    said = []
    train(tmp_path / "run", data, said.append, methods=("sgd",), epochs=12, cycles=1)
    tenths = [line.partition(", ")[0] for line in said[:-1]]
    assert tenths == [f"sgd-seed3: epoch {n} of 12" for n in (2, 3, 4, 5, 6, 8, 9, 10, 11)]


def test_resumed_time_is_the_sum_of_the_parts(tmp_path, data):
    run = train(tmp_path / "run", data, methods=("sgd",), epochs=1, cycles=1)
    state = run.load_checkpoint("sgd-seed3")
    run.save_checkpoint("sgd-seed3", {**state, "seconds": state["seconds"] + 1000})
    (run.path / "results.json").unlink()
    [result] = train(run.path, data, methods=("sgd",), epochs=1, cycles=1).results()
    assert 1000 < result["seconds"] < 1100


@pytest.mark.parametrize("method", ["sgd", "both"])
def test_divergence_is_an_error(tmp_path, data, method):
    told = rf"{method}-seed3: .* at step \d+\. Most likely the learning rate of 1e\+30 is"
    with pytest.raises(RecipeError, match=told):
        train(tmp_path / "run", data, methods=(method,), lr=1e30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cycles": 13}, "num_cycles must be at most total_steps=12"),
        ({"cycles": 5}, "num_cycles=5 does not fit total_steps=12"),
        ({"cycles": 1}, "composition='sticky' freezes from the second cycle on"),
        ({"composition": "last_k", "last_k": 4}, "k must be in 1..3"),
    ],
)
def test_values_that_do_not_fit_together(data, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change).experiment(data).check()


def result_of(method, seed, seconds, error, ensemble_error=None, nll=0.5):
    own = {"method": method, "seed": seed, "error": error, "ensemble_error": ensemble_error}
    own |= {"seconds": seconds, "cpu_seconds": 2 * seconds}
    return own | {"nll": nll, "ece": 0.01, "backward_removed": 0.25}


def test_table():
    both = result_of("both", 0, 6, 0.03, 0.01)
    table = results_table([result_of("sgd", 0, 10, 0.02), both, result_of("sgd", 1, 14, 0.04)])
    assert dict(zip(table.headers, table.rows[0], strict=True)) == {
        "method": "plain SGD",
        "error %": "3.00 ± 1.00",
        "ensemble error %": "-",
        "NLL": "0.5000 ± 0.0000",
        "ECE": "0.0100 ± 0.0000",
        "time s": "12.0 ± 2.0",
        "CPU s": "24.0 ± 4.0",
        "backward removed %": "25.0 ± 0.0",
        "vs SGD": "1.00x",
    }
    second = table.rows[1]
    assert (second[0], second[2], second[-1]) == ("FreezeOut + Snapshot", "1.00", "0.50x")


FREEZEOUT = "FreezeOut took 0.60 of plain SGD's time. A plain run that is as short"


ADVICE = {  # errors of plain SGD and FreezeOut, seconds of the second where the first took 10
    "as good": (0.02, 0.021, 6, ["take FreezeOut:", FREEZEOUT, "--epochs 6."]),
    "worse": (0.02, 0.04, 6, ["take plain SGD:", FREEZEOUT, "--epochs 6."]),
    "better": (0.04, 0.02, 6, ["take FreezeOut:"]),
    "too short": (0.02, 0.02, 9.9, ["0.99 of plain SGD's time: nothing is gained"]),
}


@pytest.mark.parametrize(("plain", "frozen", "seconds", "says"), ADVICE.values(), ids=ADVICE)
def test_what_a_comparison_advises(plain, frozen, seconds, says):
    """Of 1,000 images: the standard error of a difference of 2% and 2% is 0.63 points."""
    results = [result_of("sgd", 0, 10, plain), result_of("freezeout", 0, seconds, frozen)]
    told = advice(results, epochs=10, num_tested=1000)
    assert all(text in told for text in says)
    assert str(results_table(results, told)).endswith(told)


def test_an_ensemble_is_judged_by_its_own_error_and_seeds_by_their_spread():
    both = [result_of("both", seed, 9, 0.5, 0.02 + 0.001 * seed) for seed in range(2)]
    plain = [result_of("sgd", seed, 10, 0.03 + 0.001 * seed) for seed in range(2)]
    assert "take FreezeOut + Snapshot:" in advice([*plain, *both], 10, 100)
    assert advice(both, 10, 100) == advice(plain, 10, 100) == ""


@pytest.fixture
def run(tmp_path):
    """A run directory before its first step."""
    return RunDir.create(tmp_path / "run", "train", {}, None)


LINE = '{"method": "sgd", "seed": 0, "step": 0}'
DAMAGED = {
    "results.json": ["{", "[1]", '[{"method": "sgd", "seed": 0}]'],
    "metrics.jsonl": [
        f"{LINE}\n{text}\n" for text in ("3", '{"method": "sgd"}', "[" * 10**5, LINE[:9])
    ],
    "config.json": [
        *("{", "[]", '{"command": "train", "arguments": 3, "data_dir": null}'),
        '{"command": "train", "arguments": {"seed": 0}, "data_dir": null}',
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts]
)
def test_damaged_files(run, name, text):
    (run.path / name).write_text(text)
    where = "metrics.jsonl is damaged: line 2 is" if name == "metrics.jsonl" else re.escape(name)
    read = {"results.json": RunDir.results, "metrics.jsonl": RunDir.metrics}
    with pytest.raises(RecipeError, match=where):
        read.get(name, lambda run: RunDir.open(run.path))(run)


def test_half_a_metrics_line_ends_the_metrics(run):
    run.log({"method": "sgd", "seed": 0, "step": 0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"method": "sgd", "se')
    assert run.metrics() == [{"method": "sgd", "seed": 0, "step": 0}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "checkpoints/sgd-seed0.pt"])
def test_links_out_of_a_run_directory_are_not_followed(run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("[]")
    (run.path / name).symlink_to(outside)
    with pytest.raises(RecipeError, match="a symbolic link, which might lead anywhere, is not"):
        run.metrics(), run.results(), run.load_checkpoint("sgd-seed0")
    with pytest.raises(OSError, match="metrics") if "metrics" in name else nullcontext():
        run.log({"method": "sgd", "seed": 0, "step": 0})
    assert outside.read_text() == "[]"


def test_one_process_at_a_time_goes_on_with_a_run(run):
    left = [run.path / f".fastfreeze-{'0' * 16}.tmp", run.path / "checkpoints" / "x.pt"]
    for path in left:
        path.touch()

    def holds(ready):
        run.rewind()
        ready()
        time.sleep(60)

    with alive(holds), pytest.raises(RecipeError, match="run is in use by another process"):
        run.rewind()
    run.rewind()
    run.rewind()
    assert [path.exists() for path in left] == [False, True]


def test_rewind_keeps_what_checkpoints_cover(run):
    steps = [(method, step) for method in ("sgd", "both") for step in (0, 5, 6)]
    lines = [{"method": method, "seed": 0, "step": step} for method, step in steps]
    for line in lines:
        run.log(line)
    run.save_checkpoint("sgd-seed0", {"step": 5})
    run.rewind()
    assert run.metrics() == lines[:2]
