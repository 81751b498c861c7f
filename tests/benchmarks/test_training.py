"""benchmarks.training at toy sizes: its gates, its turns, its arithmetic, and what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

training = pytest.importorskip("benchmarks.training", reason="tests run outside the source tree")
from benchmarks import training_rivals as rivals  # noqa: E402
from benchmarks.training import RunTimes, take_turns  # noqa: E402
from benchmarks.training_rivals import (  # noqa: E402
    BASELINE,
    BEST_TORCH,
    FLAGS,
    FREEZING,
    NOT_FREEZING,
    Task,
    Training,
    deviation,
)
from fastfreeze.schedule import FreezeOut  # noqa: E402

MODEL = "resnet8-w4"
OURS, KEY = "fastfreeze", f"training-{MODEL}-0.5"


pytestmark = pytest.mark.usefixtures("one_thread")


def run(tmp_path, *rivals):
    out = tmp_path / "results.json"
    sizes = ["--samples=9", "--batch-size=4", "--epochs=6", "--image-size=8"]
    options = [*sizes, "--rounds=2", "--threads=1", "--t-0=0.5", f"--out={out}"]
    return training.main([MODEL, *options, "--rivals", *rivals]), json.loads(out.read_text())


def test_a_toy_run(tmp_path, capsys):
    code, results = run(tmp_path, BEST_TORCH, OURS, "fastfreeze cache")
    assert code == 0, results
    assert results["machine"]["torch"] == torch.__version__
    assert MODEL in results["command"]
    entry = results["results"][KEY]
    assert entry["name"] == f"{MODEL}, t_0=0.5, 12 steps, 4 freezes"
    assert set(entry["seconds"]) == {BASELINE, FLAGS, BEST_TORCH, OURS, "fastfreeze cache"}
    for total in entry["seconds"].values():
        assert 0 < total["low"] <= total["median"] <= total["high"]
    assert entry["floor_s"] > 0
    assert f"| {MODEL}, t_0=0.5, 12 steps, 4 freezes |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resnet9"], "depth of resnet must be 6 * n + 2"),
        (["--t-0=1.5"], "got 1.5"),
        (["--rounds=0"], "must be at least 1, got 0"),
        (["--samples=8", "--batch-size=9"], "--samples must be at least --batch-size, got 8 and 9"),
        (["--rivals", "adam"], "adam"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        training.main(options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def broken(change):
    """Our rival, with something wrong with it."""

    def make(task, t_0):
        found = rivals.ours(task, t_0)
        return change(found) or found

    return make


def norms_stay_in_training(found):
    return replace(found, network=lambda images, ids: found.model.train()(images))


def last_values(found):
    seen = []

    def network(images, ids):
        seen.append(images)
        return found.model(seen[0])

    return replace(found, network=network)


def forgets_momentum(found):
    step = found.optimizer.step

    def forgetting():
        step()
        found.optimizer.state.clear()

    found.optimizer.step = forgetting


def one_weight_off(found):
    found.after_step = lambda taken: next(found.model.parameters()).data.mul_(1.001)


@pytest.mark.parametrize(
    "change",
    [norms_stay_in_training, last_values, forgets_momentum, one_weight_off],
    ids=lambda f: f.__name__,
)
def test_a_rival_that_trains_otherwise_is_refused(monkeypatch, tmp_path, capsys, change):
    monkeypatch.setitem(FREEZING, OURS, broken(change))
    code, results = run(tmp_path, OURS)
    assert code == 1
    entry = results["results"][KEY]
    assert entry["seconds"] == {}
    assert list(entry["left_out"]) == [OURS]
    assert "another result: " in entry["left_out"][OURS]
    assert f"{KEY}: {OURS}: " in capsys.readouterr().out


def test_a_rival_that_fails_is_refused(monkeypatch, tmp_path):
    def fails(images):
        raise RuntimeError("gradients differ")

    monkeypatch.setitem(FREEZING, OURS, broken(lambda found: replace(found, verify=fails)))
    assert training.gate(MODEL, [BASELINE, FLAGS, OURS], 0.5, 8) == {
        OURS: "RuntimeError: gradients differ"
    }


def test_another_schedule_is_no_rival_of_the_baseline(monkeypatch):
    longer = lambda task, t_0: rivals.plain(  # noqa: E731
        replace(task, order=torch.cat([task.order] * 2)), t_0
    )
    monkeypatch.setitem(NOT_FREEZING, BEST_TORCH, longer)
    assert list(training.gate(MODEL, [BASELINE, BEST_TORCH, FLAGS], 0.5, 8)) == [BEST_TORCH]


def test_flags_follow_the_schedule_and_time_what_is_frozen(monkeypatch):
    task = Task.random(MODEL, 8, 4, epochs=6, image_size=8)
    schedule = FreezeOut(12, t_0=0.5)
    found = rivals.flags(task, 0.5)
    groups = found.optimizer.param_groups
    called = []
    monkeypatch.setattr(rivals.time, "perf_counter", lambda: float(len(called)))
    for link in (found.model.stem, *found.model.blocks, found.model.head):
        link.register_forward_hook(lambda *_: called.append(1))
    for step in range(12):
        frozen = [schedule.is_frozen(step, i, len(groups)) for i in range(len(groups))]
        assert [not g["params"][0].requires_grad for g in groups] == frozen
        assert found.model.blocks[0].norm1.training != frozen[1]
        for i, group in enumerate(groups):
            assert group["lr"] == schedule.lr(step, rivals.LR, i, len(groups))
        before = found.notes()["prefix_seconds"]
        found.step(*task.batch(step))
        assert found.notes()["prefix_seconds"] - before == sum(frozen)
    assert sum(frozen) == 4


@pytest.mark.parametrize("off", [0.05, math.nan])
def test_losses_that_differ_in_the_timed_run_are_told(off):
    good, bad = RunTimes(losses=[2.0, 1.9, 1.8]), RunTimes(losses=[2.0, 1.9 + off, 1.8 + off])
    near = RunTimes(losses=[2.0, 1.91, 1.7])  # one that is off is no more than rounding can do
    names = [BASELINE, BEST_TORCH, FLAGS, OURS]
    runs = [dict(zip(names, row, strict=True)) for row in ([good] * 4, [good, bad, good, near])]
    assert list(training.disagreements(runs)) == [BEST_TORCH]


def test_rivals_take_turns_on_the_same_batches():
    task = Task.random(MODEL, 8, 4, epochs=3, image_size=8)
    log = []

    class Logged:
        def __init__(self, name):
            self.name = name
            self.notes = dict

        def step(self, images, labels, ids):
            log.append((self.name, tuple(ids.tolist())))
            return torch.zeros(())

    makes = {name: lambda name=name: Logged(name) for name in "ab"}
    times = take_turns(makes, task, first=1, slice_steps=2)
    assert "".join(name for name, _ in log) == "bb" + "aa" + "aabb" + "bbaa"
    for name in "ab":
        assert [ids for n, ids in log if n == name] == [tuple(row) for row in task.order.tolist()]
        assert len(times[name].losses) == 6
        assert times[name].seconds > 0
    for epoch in task.order.view(3, 8):
        assert sorted(epoch.tolist()) == list(range(8))


def test_an_entry(monkeypatch):
    def runs(second, prefix):
        return {BASELINE: RunTimes(second), FLAGS: RunTimes(64, notes={"prefix_seconds": prefix})}

    rounds = [runs(60.0, 34.0), runs(120.0, 4.0)]
    monkeypatch.setattr(training, "gate", lambda *_: {})
    monkeypatch.setattr(training, "disagreements", lambda rounds: {})
    monkeypatch.setattr(training, "take_turns", lambda makes, task, first: rounds[first])
    task = Task.random(MODEL, 8, 4, epochs=3, image_size=8)
    entry = training.entry_of(task, [BASELINE, FLAGS], 0.5, rounds=2)
    assert entry["seconds"][BASELINE] == {"median": 90.0, "low": 60.0, "high": 120.0}
    assert entry["seconds"][FLAGS] == {"median": 64.0, "low": 64.0, "high": 64.0}
    assert entry["floor_s"] == 90 * 0.5  # half of torch's time in both rounds


@pytest.mark.parametrize(
    ("tensor", "off", "reason"),
    [
        ("weight", 1e-5, None),
        ("weight", 2e-4, "weights are 1.4e-01 of their change"),
        ("weight", math.nan, "weights are nan of their change"),
        ("weight", -1e-3, "weight has not changed"),
        ("frozen", 1e-12, "frozen has changed"),
        ("mean", 5e-10, None),
        ("mean", 2e-9, "statistics are 2.0e-01 of their change"),
        ("count", 1, "count is 2, not 1"),
    ],
)
def test_what_tells_one_training_from_another(tensor, off, reason):
    """Two weights move by 1e-3, the statistics by 1e-8."""
    moved = {"weight": 1e-3, "other": 1e-3, "frozen": 0.0, "mean": 1e-8, "count": 1}
    zero = {**dict.fromkeys(moved, 0.0), "count": 0}

    def trained(moved):
        model = torch.nn.Module()
        for name in ("weight", "other", "frozen"):
            model.register_parameter(name, torch.nn.Parameter(torch.tensor([moved[name]] * 4)))
        model.register_buffer("mean", torch.tensor([moved["mean"]] * 4))
        model.register_buffer("count", torch.tensor(moved["count"]))
        return Training(model, None, None)

    truth, start = (trained(m).model.state_dict() for m in (moved, zero))
    found = deviation(trained({**moved, tensor: moved[tensor] + off}), truth, start)
    assert found == reason if reason is None else reason in found
