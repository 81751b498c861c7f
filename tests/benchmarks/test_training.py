"""benchmarks.training at toy sizes: its gates, its turns, its arithmetic, and what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

training = pytest.importorskip("benchmarks.training", reason="tests run outside the source tree")
from benchmarks import training_rivals as rivals  # noqa: E402
from benchmarks.training_rivals import (  # noqa: E402
    BASELINE,
    BEST_TORCH,
    FLAGS,
    FREEZING,
    NOT_FREEZING,
    RunTimes,
    Task,
    frozen_layers,
    take_turns,
)
from fastfreeze.schedule import FreezeOut  # noqa: E402

MODEL = "resnet8-w4"
OURS = "fastfreeze"


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
    entry = results["models"][MODEL]
    assert (entry["status"], entry["steps"]) == ("measured", 12)
    at = entry["t_0"]["0.5"]
    assert at["freezes"] == 4
    assert at["rivals"][FLAGS]["saved"]["median"] < at["limit"]["median"] < 1
    assert set(at["rivals"]) == {BASELINE, FLAGS, BEST_TORCH, OURS, "fastfreeze cache"}
    for name, line in at["rivals"].items():
        total = line["total"]
        assert 0 < total["lowest"] <= total["median"] <= total["highest"]
        assert line["saved"]["highest"] < 1
        assert bool(line["recuts"]) == (name in FREEZING)
    assert at["rivals"][BASELINE]["saved"] == {"median": 0, "lowest": 0, "highest": 0}
    assert at["rivals"]["fastfreeze cache"]["notes"].keys() >= {"hits", "misses", "reason"}
    text = capsys.readouterr().out
    assert f"{MODEL}, t_0=0.5: 12 steps, 4 freezes. Limit:" in text
    assert f"| {OURS} |" in text


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
    found.after_step = lambda: next(found.model.parameters()).data.mul_(1.001)


@pytest.mark.parametrize(
    "change",
    [norms_stay_in_training, last_values, forgets_momentum, one_weight_off],
    ids=lambda f: f.__name__,
)
def test_a_rival_that_trains_otherwise_is_refused(monkeypatch, tmp_path, capsys, change):
    monkeypatch.setitem(FREEZING, OURS, broken(change))
    code, results = run(tmp_path, OURS)
    assert code == 1
    entry = results["models"][MODEL]
    assert (entry["status"], set(entry)) == ("refused", {"status", "wrong"})
    assert list(entry["wrong"]) == [OURS]
    assert "of its change from that of flags" in entry["wrong"][OURS]
    assert "no times, since the rivals do not train alike" in capsys.readouterr().out


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


def test_flags_follow_the_schedule():
    task = Task.random(MODEL, 8, 4, epochs=6, image_size=8)
    schedule = FreezeOut(12, t_0=0.5)
    found = rivals.flags(task, 0.5)
    groups = found.optimizer.param_groups
    for step in range(12):
        frozen = [schedule.is_frozen(step, i, len(groups)) for i in range(len(groups))]
        assert [not g["params"][0].requires_grad for g in groups] == frozen
        assert found.model.blocks[0].norm1.training != frozen[1]
        for i, group in enumerate(groups):
            assert group["lr"] == schedule.lr(step, rivals.LR, i, len(groups))
        found.step(*task.batch(step))
    assert sum(frozen) == 4


@pytest.mark.parametrize("off", [0.05, math.nan])
def test_losses_that_differ_in_the_timed_run_are_told(off):
    good, bad = RunTimes(losses=[2.0, 1.9, 1.8]), RunTimes(losses=[2.0, 1.9 + off, 1.8 + off])
    near = RunTimes(losses=[2.0, 1.91, 1.7])  # one that is off is no more than rounding can do
    keys = [(BASELINE, 0.5), (BEST_TORCH, 0.5), (FLAGS, 0.5), (OURS, 0.5)]
    runs = [dict(zip(keys, row, strict=True)) for row in ([good] * 4, [good, bad, good, near])]
    assert list(training.disagreements(runs)) == [f"{BEST_TORCH}, t_0=0.5"]


def test_rivals_take_turns_on_the_same_batches():
    task = Task.random(MODEL, 8, 4, epochs=3, image_size=8)
    log = []

    class Logged:
        def __init__(self, name):
            self.name = name
            self.notes = dict

        def step(self, images, labels, ids):
            log.append((self.name, tuple(ids.tolist())))
            return 0.0

    makes = {name: lambda name=name: Logged(name) for name in "ab"}
    times = take_turns(makes, task, first=1, slice_steps=2)
    assert "".join(name for name, _ in log) == "bb" + "aa" + "aabb" + "bbaa"
    for name in "ab":
        assert [ids for n, ids in log if n == name] == [tuple(row) for row in task.order.tolist()]
        assert len(times[name].steps) == 6
        assert times[name].total > 0
    for epoch in task.order.view(3, 8):
        assert sorted(epoch.tolist()) == list(range(8))


def test_what_a_stage_costs():
    frozen = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]
    seconds = [9.0, 5.0, 4.0, 8.0, 4.0, 3.0, 3.5, 1.0, 7.0, 6.0, 1.0, 2.0]
    assert training.stages(frozen) == [range(3), range(3, 7), range(7, 9), range(9, 12)]
    usual = [4.0] * 3 + [3.25] * 4 + [4.0] * 2 + [2.0] * 3
    assert training.usual_seconds(seconds, frozen) == usual
    assert training.recut_seconds(seconds, frozen) == [8 + 4 - 6.5, 6 + 1 - 4]


def test_a_summary():
    frozen = [0, 0, 1, 1, 1, 1]
    baseline = [RunTimes(0.0, [10.0] * 6), RunTimes(0.0, [20.0] * 6)]
    ours = [RunTimes(4.0, [10.0, 10.0, 18.0, 8.0, 5.0, 5.0])] * 2
    summary = training.summarize({BASELINE: baseline, OURS: ours}, frozen)[OURS]
    assert summary.total == training.Spread(60.0, 60.0, 60.0)
    assert summary.saved == training.Spread(0.25, 0.0, 0.5)
    assert summary.saved_of_best_torch is None
    assert summary.once == 60 - (10 + 10 + 5 * 4)
    assert summary.saved_in_a_long_run == pytest.approx(1 - 40 / 90)
    assert summary.recuts == pytest.approx([(18 + 8 - 10) / 15])


def test_the_limit_leaves_out_what_is_frozen():
    runs = [RunTimes(1.0, [4.0, 3.0], notes={"prefix_seconds": p}) for p in (2.0, 3.0, 0.0)]
    baseline = [RunTimes(0.0, [10.0])] * 3
    assert training.limit(runs, baseline) == training.Spread(0.4, pytest.approx(0.2), 0.5)


def test_flags_time_what_is_frozen():
    task = Task.random(MODEL, 8, 4, epochs=2, image_size=8)
    schedule = FreezeOut(4, t_0=0.5)
    assert frozen_layers(schedule, num_layers=5) == [0, 2, 3, 4]
    found = rivals.flags(task, 0.5)
    seconds = [found.notes()["prefix_seconds"]]
    for step in range(4):
        found.step(*task.batch(step))
        seconds.append(found.notes()["prefix_seconds"])
    assert seconds[0] == 0
    assert seconds == sorted(set(seconds))


def test_deviation_is_that_of_the_worst_tensor():
    task = Task.random(MODEL, 4, 4, epochs=1, image_size=8)
    a, b = (rivals.plain(task, 0.5) for _ in range(2))
    start = task.build()
    assert rivals.largest_deviation(a, b, start)[0] == 0
    b.step(*task.batch(0))
    a.step(*task.batch(0))
    assert rivals.largest_deviation(a, b, start)[0] < 1e-6
    a.model.head.layers[-1].bias.data += math.nan
    assert rivals.largest_deviation(a, b, start) == (math.inf, "head.layers.2.bias")
