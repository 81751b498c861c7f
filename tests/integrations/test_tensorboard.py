"""What is written for TensorBoard, read back from its files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze.integrations.tensorboard import log_report, log_step

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

STEPS = 12


def training():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    schedule = fastfreeze.FreezeOut(STEPS, t_0=0.5)
    plan = fastfreeze.split(model, torch.randn(2, 4), schedule=schedule, lr=0.1)
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.1, schedule=schedule)
    report = fastfreeze.FreezeReport(model, optimizer, plan, torch.randn(2, 4))

    def train():
        for _ in range(STEPS):
            with report.step():
                optimizer.zero_grad()
                model(torch.randn(6, 4)).square().sum().backward()
                optimizer.step()

    return plan, optimizer, report, train


@pytest.fixture
def logs(tmp_path):
    """A writer, and what reads its scalars as a dict of steps to values."""
    writer = SummaryWriter(str(tmp_path))

    def read(name):
        writer.flush()
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(name)}

    yield writer, read
    writer.close()


def test_rates_and_frozen_layers_are_written_for_each_step(logs):
    writer, read = logs
    plan, optimizer, _, train = training()
    optimizer.register_step_post_hook(lambda *_: log_step(writer, optimizer))
    train()
    for layer in plan.layers:
        rates = read(f"learning_rate/{layer.index:03d}_{layer.name}")
        expected = plan.schedule.lr(list(rates), 0.1, layer.index, len(plan.layers))
        assert list(rates) == list(range(1, STEPS + 1))
        assert list(rates.values()) == pytest.approx(list(expected), rel=1e-6)
    frozen = {n: len(f) for n, f in plan.schedule.frozen_layers(3)}
    written = read("frozen_layers")
    assert {n: count for n, count in written.items() if n in frozen} == {
        n: count for n, count in frozen.items() if n
    }


def test_groups_without_layers_go_by_number(logs):
    writer, read = logs
    optimizer = fastfreeze.SGD(nn.Linear(2, 2).parameters(), 0.1, total_steps=4)
    log_step(writer, optimizer)
    assert read("learning_rate/0") == pytest.approx({0: 0.1})


def test_a_scheduler_that_freezes_is_logged_too(logs):
    writer, read = logs
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = fastfreeze.split(model, torch.zeros(1, 2)).param_groups()
    optimizer = torch.optim.AdamW(groups, 0.1)
    log_step(writer, fastfreeze.FreezeScheduler(optimizer, fastfreeze.Frozen(4, until=1)))
    assert read("frozen_layers") == {0: 1}
    assert read("learning_rate/001_1") == pytest.approx({0: 0.1})


def test_predicted_and_measured_saving_are_written_for_each_event(logs):
    writer, read = logs
    _, _, report, train = training()
    train()
    log_report(writer, report)
    assert len(report.rows) == 2
    for name in ("predicted", "limit", "measured"):
        values = {row.step: getattr(row, name) for row in report.rows}
        known = {n: value for n, value in values.items() if value is not None}
        assert (read(f"step_time/{name}") if known else {}) == pytest.approx(known, rel=1e-6)


def test_what_is_no_writer_or_no_optimizer_of_ours_is_refused(logs):
    with pytest.raises(TypeError, match=r"pip install tensorboard.*got str"):
        log_step("runs", training()[1])
    with pytest.raises(TypeError, match="a FreezeScheduler, got Adam"):
        log_step(logs[0], torch.optim.Adam(nn.Linear(2, 2).parameters()))
