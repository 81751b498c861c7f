"""The freeze report: predictions against torch's FLOPs and a made-up clock, and no side effects."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastfreeze
from fastfreeze import FastfreezeWarning, FreezeOut, FreezeOutCycles, FreezeReport, split, trim
from fastfreeze.layers.costs import LayerCosts, LayerFlops
from fastfreeze.layers.execution import run_events
from fastfreeze.recipes.models import build_model
from tests.nets import Skipping, linears

pytestmark = pytest.mark.usefixtures("one_thread")


def freeze_layers(plan, frozen):
    for layer in plan.layers:
        for parameter in layer.trainable:
            parameter.requires_grad_(layer.index not in frozen)


@pytest.mark.parametrize("name", ["resnet8-w4", "densenet-bc-10", "wrn10-1"])
def test_flops_of_every_cut_are_those_that_torch_counts(name):
    model, x = build_model(name, num_classes=2), torch.randn(2, 3, 16, 16)
    plan = split(model, x)
    flops = LayerFlops(plan, run_events(model, x))
    for end in range(len(plan.layers)):
        frozen = range(end)
        freeze_layers(plan, frozen)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert flops.costs().step(frozen, flops.alive(frozen)) == counter.get_total_flops()


def test_what_is_alive_of_layers_that_share_or_have_no_flops():
    model, x = Skipping(), torch.randn(5, 6)
    with pytest.warns(FastfreezeWarning, match="also used before"):
        plan = split(model, x)
    flops = LayerFlops(plan, run_events(model, x))
    assert flops.alive([0, 1])[:2] == [0.5, 0.5]  # of their inputs
    assert flops.alive([0, 1, 2]) == [0.0, 0.0, 0.0]
    model, x = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), torch.ones(2, 2)
    plan = split(model, x.long(), layers=["0", "1", "2"])
    flops = LayerFlops(plan, run_events(model, x.long()))
    assert flops.alive([]) == [1.0, 1.0, 1.0]
    assert flops.alive([0]) == [0.0, 1.0, 1.0]
    assert flops.alive([0, 1]) == [0.0, 0.0, 0.5]  # of two gradients, that of the weight


def test_costs():
    costs = LayerCosts(forward=(1, 2, 4), backward=(10, 20, 40), update=(100, 200, 400), rest=1000)
    assert costs.step([], [1, 1, 1]) == 1777
    assert costs.step([0, 1], [0, 0.5, 1]) == 1000 + 7 + 10 + 40 + 400
    assert costs.step_without_prefix([0, 1], [0, 0.5, 1]) == 1000 + 6 + 10 + 40 + 400


class Spends(torch.autograd.Function):
    """Takes its time in the backward."""

    @staticmethod
    def forward(ctx, x, seconds, now):
        ctx.spent = seconds, now
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        seconds, now = ctx.spent
        now[0] += seconds
        return gradient, None, None


class Slow(nn.Linear):
    """Takes ``forward_s`` and, if its weight trains, ``backward_s`` of a made-up clock."""

    def __init__(self, now, forward_s, backward_s):
        super().__init__(4, 4)
        self.now, self.forward_s, self.backward_s = now, forward_s, backward_s

    def forward(self, x):
        self.now[0] += self.forward_s
        weight = Spends.apply(self.weight, self.backward_s, self.now)
        return F.linear(x, weight, self.bias)


@pytest.fixture
def now(monkeypatch):
    reading = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: reading[0])
    return reading


def slow_model(now):
    return nn.Sequential(Slow(now, 1, 4), Slow(now, 2, 8), Slow(now, 3, 16))


def watched(model, x=None, **options):
    """A report of the model's steps under a plain optimizer."""
    x = torch.randn(2, 4) if x is None else x
    plan = split(model, x, **options)
    optimizer = torch.optim.SGD(plan.param_groups(), 1e-3)
    return FreezeReport(model, optimizer, plan, x), model, optimizer, x


def has_hooks(model):
    of_modules = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    return any([*of_modules, *(p._post_accumulate_grad_hooks for p in model.parameters())])


def train(report, model, optimizer, x, steps, now=None, rest=0.0):
    for _ in range(steps):
        with report.step():
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if now is not None:
                now[0] += rest
            optimizer.step()


def test_times_are_measured_and_predicted(now):
    """34 s forward and backward, 6 s of something else; nothing else takes time on this clock."""
    report, *run = watched(slow_model(now))
    assert report.rows == ()
    assert str(report) == "no layer has been frozen or thawed yet"
    train(report, *run, 9, now, 6.0)
    run[0][0].requires_grad_(False)
    train(report, *run, 1, now, 6.0)  # noticed at the end of a step
    (row,) = report.rows
    assert (row.step, row.frozen, row.blockers) == (10, (0,), ())
    assert row.before == pytest.approx(40)
    assert row.after is row.measured is None
    train(report, *run, 2, now, 6.0)
    assert report.rows[0].after is None
    train(report, *run, 3, now, 6.0)
    (row,) = report.rows
    # layer 1's backward has one of its two gradients left, as far as FLOPs can tell
    assert row.predicted == pytest.approx((40 - 4 - 8 / 2) / 40)
    assert row.limit == pytest.approx((40 - 4 - 8 / 2 - 1) / 40)
    assert row.measured == pytest.approx(36 / 40)
    assert report.source == "the layers' times in 5 steps"


def test_the_update_of_frozen_layers_is_gone(now):
    report, *run = watched(slow_model(now), layers=["0", "1", "2"])
    run[1].register_step_post_hook(lambda *_: now.__setitem__(0, now[0] + 30.0))
    train(report, *run, 4)
    run[0][0].requires_grad_(False)
    train(report, *run, 1)
    assert report.rows[0].predicted == pytest.approx((64 - 4 - 4 - 10) / 64)


def test_medians_of_the_latest_steps(now):
    report, *run = watched(slow_model(now))
    for rest in [1e6, 1e6, 7.0, 7.0, *[100.0] * 10, *[2.0] * 95]:  # 2 first steps are left out
        train(report, *run, 1, now, rest)
    run[0][0].requires_grad_(False)
    train(report, *run, 1, now, 2.0)
    assert report.rows[0].before == pytest.approx(36)


def test_without_a_profile_flops_predict():
    """Something is frozen from the start: hooks would keep the network from being trimmed."""
    model, x = build_model("resnet8-w4", num_classes=2), torch.randn(2, 3, 8, 8)
    model.stem.layers[1].bias.requires_grad_(False)
    plan = split(model, x)
    network = trim(model)
    optimizer = torch.optim.SGD(plan.param_groups(), 1e-3)
    report = FreezeReport(network, optimizer, plan, x)
    train(report, network, optimizer, x, 5)
    freeze_layers(plan, [0, 1])
    train(report, network, optimizer, x, 3)
    assert report.source == "FLOPs"
    assert 0 < report.rows[0].limit < report.rows[0].predicted < 1
    assert "predicted, from FLOPs" in str(report)


def freezing_run(schedule, *, report=True, steps=None):
    """Losses, weights, and the report, if any, of a small training."""
    torch.manual_seed(0)
    model = build_model("resnet8-w4", num_classes=2)
    data = torch.randn(schedule.total_steps, 4, 3, 8, 8)
    labels = torch.randint(2, (schedule.total_steps, 4))
    plan = split(model, data[0], schedule=schedule, lr=0.05)
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.05, momentum=0.9, schedule=schedule)
    network = trim(model)
    made = FreezeReport(network, optimizer, plan, data[0]) if report else None
    losses = []
    for x, y in zip(data[:steps], labels[:steps], strict=True):
        with made.step() if made else contextlib.nullcontext():
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model, made


def test_every_event_of_a_schedule_is_a_row():
    schedule = FreezeOut(30, t_0=0.4, scale_lr=False)
    _, _, report = freezing_run(schedule)
    events = [schedule.freeze_steps(i, 5)[0] for i in range(4)]
    assert [row.step for row in report.rows] == events
    assert [row.frozen for row in report.rows] == [tuple(range(i + 1)) for i in range(4)]
    assert all(row.limit < row.predicted < 1 for row in report.rows)
    assert not any(row.blockers for row in report.rows)
    lines = str(report).splitlines()
    headers = "step frozen layers predicted limit measured ms before ms after"
    assert " ".join(lines[0].split()) == headers
    assert [line.split()[1] for line in lines[2:6]] == ["0", "0..1", "0..2", "0..3"]
    total = math.prod(row.predicted for row in report.rows)
    assert lines[7] == report.summary
    assert report.summary.startswith(f"step time by freezing: predicted {total:.3f}, limit ")
    assert max(map(len, lines)) <= 100


def test_a_thaw_is_an_event_too():
    schedule = FreezeOutCycles(40, num_cycles=2, t_0=0.4, scale_lr=False, composition="thaw")
    _, _, report = freezing_run(schedule, steps=39)
    thaw = next(row for row in report.rows if not row.frozen)
    assert (thaw.step, thaw.thawed) == (20, (0, 1, 2, 3))
    assert 1 < thaw.predicted < thaw.limit
    freezes = [row for row in report.rows if row is not thaw and not row.thawed]
    assert len(freezes) == len(report.rows) - 1 > 4
    saved = math.prod(row.predicted for row in freezes)
    freezing, thawing = report.summary.splitlines()
    assert freezing.startswith(f"step time by freezing: predicted {saved:.3f}, limit ")
    assert thawing.startswith(f"step time by thawing: predicted {thaw.predicted:.3f}, limit ")


def test_freezes_and_thaws_are_measured_apart(now):
    report, model, _, x = watched(slow_model(now))
    for frozen, seconds in (((), 40.0), ((0,), 20.0), ((), 30.0), ((0,), 15.0)):
        model[0].requires_grad_(not frozen)
        for _ in range(6):
            start = now[0]
            with report.step():
                model(x).square().sum().backward()
                now[0] = start + seconds
    assert [line.split()[-1] for line in report.summary.splitlines()] == ["0.250", "1.500"]


def test_a_report_changes_no_number():
    schedule = FreezeOut(40, t_0=0.5)
    losses, model, report = freezing_run(schedule)
    plain_losses, plain_model, _ = freezing_run(schedule, report=False)
    assert losses == plain_losses
    torch.testing.assert_close(model.state_dict(), plain_model.state_dict(), rtol=0, atol=0)
    assert report.source != "FLOPs"
    assert not has_hooks(model)


def test_steps_of_a_resumed_run_are_counted():
    model, x = linears(4, 4, 2), torch.randn(2, 4)
    schedule = FreezeOut(30, t_0=0.8)
    plan = split(model, x)
    optimizer = fastfreeze.SGD(plan.param_groups(), 1e-3, schedule=schedule)
    (event,) = schedule.freeze_steps(0, 2)
    optimizer.current_step = event - 2
    report = FreezeReport(model, optimizer, plan, x)
    train(report, model, optimizer, x, 3)
    assert [row.step for row in report.rows] == [event]


def test_an_error_in_a_step_is_not_a_step_and_leaves_no_hooks():
    report, *run = watched(linears(4, 4, 2))
    train(report, *run, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        train(report, *run[:2], torch.ones(2, 9), 1)
    assert not has_hooks(run[0])
    run[0][0].requires_grad_(False)
    train(report, *run, 1)
    assert report.rows[0].step == 4


def test_each_event_with_a_blocker_warns_once():
    torch.manual_seed(0)
    model, x = build_model("resnet8-w4", num_classes=2), torch.randn(2, 3, 8, 8)
    norm = model.stem.layers[1]
    norm.weight.requires_grad_(False)
    schedule = FreezeOut(30, t_0=0.4, scale_lr=False)
    plan = split(model, x, schedule=schedule)
    norm.weight.requires_grad_(True)  # in no group of the optimizer
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.05, schedule=schedule)
    report = FreezeReport(model, optimizer, plan, x)
    with pytest.warns(FastfreezeWarning, match="still trains") as caught:
        train(report, model, optimizer, x, 30)
    assert [str(w.message).split(":")[0] for w in caught] == [f"step {r.step}" for r in report.rows]
    assert all(w.filename == __file__ for w in caught)
    shares = [row.blockers[0].share for row in report.rows]
    assert all(len(row.blockers) == 1 for row in report.rows)
    assert report.rows[0].blockers[0].parameter == "stem.layers.1.weight"
    assert shares == sorted(shares)
    assert str(report).splitlines()[-1].endswith(str(report.rows[-1].blockers[0]))


def test_planned_sharing_is_a_blocker():
    with pytest.warns(FastfreezeWarning, match="also used before"):
        report, *run = watched(Skipping(), torch.randn(5, 6))
    train(report, *run, 3)
    run[0].a.requires_grad_(False)
    with pytest.warns(FastfreezeWarning, match=r"head\.weight still trains: 50% of the prefix's"):
        train(report, *run, 1)
    assert report.rows[0].predicted < 1


def test_plan_must_be_the_networks():
    model, x = linears(4, 4, 2), torch.randn(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="plan must be of this Sequential, but is of another"):
        FreezeReport(model, optimizer, split(linears(4, 4, 2), x), x)
