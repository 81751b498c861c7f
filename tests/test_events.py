"""A run's metrics as TensorBoard reads them: the same after a resume, and none without it."""

import json
import sys

import pytest

from fastfreeze.recipes.events import Events

START = {"event": "start", "layers": ["stem", "head"], "step": 0}
SNAPSHOT = {"event": "snapshot", "cycle": 0, "step": 4}
RESULT = {
    "error": 0.25,
    "ensemble_error": None,
    "nll": 0.5,
    "ece": 0.1,
    "seconds": 3.0,
    "backward_removed": 0.0,
}


def epoch(number):
    return {
        "event": "epoch",
        "step": 2 * number,
        "epoch": number,
        "lr": [0.0, 0.1 / number],
        "frozen_layers": [0],
        "train_loss": 1 / number,
        "test_error": 0.5 / number,
        "seconds": 1.5 * number,
        "peak_memory_mb": None,
        "step_losses": [2.0 / number, 1.0 / number],
    }


def read(directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory), {"scalars": 0}).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_events_are_the_metrics(tmp_path):
    events = Events(tmp_path / "run")
    events.add([START, epoch(1)])
    events.add([SNAPSHOT, epoch(2)])
    events.add_result(RESULT, 4)
    events.close()
    found = read(tmp_path / "run")
    assert found == {
        "loss/train": [(2, 1.0), (4, 0.5)],
        "loss/step": [(0, 2.0), (1, 1.0), (2, 1.0), (3, 0.5)],
        "error/test": [(2, 0.5), (4, 0.25)],
        "time/seconds": [(2, 1.5), (4, 3.0)],
        "frozen_layers": [(2, 1), (4, 1)],
        "learning_rate/000_stem": [(2, 0), (4, 0)],
        "learning_rate/001_head": [(2, 0.1), (4, 0.05)],
        "snapshots": [(4, 1)],
        "result/error": [(4, 0.25)],
        "result/nll": [(4, 0.5)],
        "result/ece": [(4, 0.1)],
        "result/seconds": [(4, 3.0)],
        "result/backward_removed": [(4, 0)],
    }


def test_what_a_killed_run_wrote_is_gone(tmp_path):
    killed = Events(tmp_path / "run")
    killed.add([START, epoch(1), epoch(2)])
    killed.close()
    resumed = Events(tmp_path / "run")
    resumed.add([START, epoch(1)])
    resumed.close()
    assert read(tmp_path / "run")["loss/train"] == [(2, 1.0)]
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    events = Events(tmp_path / "run")
    events.add([START, epoch(1)])
    events.add_result(json.loads(json.dumps(RESULT)), 4)
    events.close()
    assert list(tmp_path.iterdir()) == []
