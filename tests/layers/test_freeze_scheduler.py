"""FreezeScheduler: any optimizer does what a loop by hand over the schedule's functions does."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze import (
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    FreezeScheduler,
    Frozen,
    GradualUnfreezing,
    SnapshotCycles,
)
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.groups import FollowedGroups
from tests.covering import covering

TOTAL = 12


def of(make, **options):
    return lambda groups: make(groups, **options)


class EarlyState(torch.optim.Optimizer):
    """Has state from the beginning and cannot do without, as some of torch's Adagrads."""

    def __init__(self, params, lr=0.1, start=2.0):
        super().__init__(params, {"lr": lr, "start": start})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, start)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p]["sum"].add_(p.grad.square())
                    p.addcdiv_(p.grad, total.sqrt(), value=-group["lr"])


OPTIMIZERS = {
    "EarlyState": of(EarlyState, start=3.0),
    "Adagrad": of(torch.optim.Adagrad, lr=0.05),
    "AdamW": of(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "Adam amsgrad": of(torch.optim.Adam, lr=0.02, amsgrad=True),
    "AdamW fused": of(torch.optim.AdamW, lr=0.02, fused=True),
    "SGD": of(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": of(torch.optim.RMSprop, lr=0.01, centered=True),
    "NAdam": of(torch.optim.NAdam, lr=0.01),
    "fastfreeze.SGD": of(fastfreeze.SGD, lr=0.1, momentum=0.9),
    "fastfreeze.AdamW": of(fastfreeze.AdamW, lr=0.02, amsgrad=True),
}
TIMM = ["timm lion", "timm adan", "timm adopt"]
SCHEDULES = {
    "FreezeOut": FreezeOut(TOTAL, t_0=0.25, scale_lr=False),
    "FreezeOut scaled": FreezeOut(TOTAL, t_0=0.5),
    "Cosine": Cosine(TOTAL),
    "constant": fastfreeze.Constant(TOTAL),
    "cycles": SnapshotCycles(TOTAL, num_cycles=3),
    "thaws": FreezeOutCycles(TOTAL, num_cycles=2, t_0=0.3, scale_lr=False, composition="thaw"),
    "frozen": Frozen(TOTAL, until=2, warmup_steps=3),
    "unfreezes": GradualUnfreezing(TOTAL, unfreeze_every=3, warmup_steps=5, layer_decay=0.7),
}
FREEZING = SCHEDULES["FreezeOut"]


def net(bias=True):
    torch.manual_seed(0)
    sizes = (6, 8, 8, 8)
    layers = [(nn.Linear(m, n, bias), nn.Tanh()) for m, n in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(8, 3, bias))


def groups_of(model, schedule=None, **options):
    return fastfreeze.split(model, torch.zeros(1, 6), schedule=schedule).param_groups(**options)


def unscheduled(name="AdamW"):
    """A model and its optimizer."""
    model = net(bias=name != "Muon")  # which is for matrices
    make = OPTIMIZERS.get(name) or of(getattr(torch.optim, name, None), lr=0.01)
    if name in TIMM:
        kind = pytest.importorskip("timm.optim").get_optimizer_class(name.removeprefix("timm "))
        make = of(kind, lr=0.01)
    return model, make(groups_of(model))


def made(schedule, name="AdamW"):
    model, optimizer = unscheduled(name)
    return model, optimizer, FreezeScheduler(optimizer, schedule)


def trained(steps, schedule=FREEZING, name="AdamW"):
    run = made(schedule, name)
    train(*run, range(steps))
    return run


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(5, 6, generator=generator)
    loss = (model(images) - torch.randn(5, 3, generator=generator)).square().mean()
    if loss.requires_grad:
        loss.backward()


def train(model, optimizer, scheduler, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def train_by_hand(model, optimizer, schedule):
    """The same with the schedule's own functions, and parameters that are passed over."""
    initial = [group["lr"] for group in optimizer.param_groups]
    early = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    for step in range(TOTAL):
        for group, lr in zip(optimizer.param_groups, initial, strict=True):
            place = group["layer_index"], group["num_layers"]
            group["lr"] = schedule.lr(step, lr, *place)
            frozen = schedule.is_frozen(step, *place)
            for p in group["params"]:
                p.requires_grad_(not frozen)
                if frozen:
                    optimizer.state.pop(p, None)
                elif p in early and p not in optimizer.state:
                    optimizer.state[p] = copy.deepcopy(early[p])
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


HAS_MUON = hasattr(torch.optim, "Muon")
RUNS = [(name, schedule) for name in OPTIMIZERS for schedule in ("thaws", "unfreezes")]
RUNS += [("AdamW", schedule) for schedule in SCHEDULES if schedule not in ("thaws", "unfreezes")]
RUNS += [(name, "thaws") for name in [*TIMM, *(["Muon"] if HAS_MUON else [])]]


@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_any_optimizer_does_what_a_loop_by_hand_does(name, schedule):
    model, _, _ = trained(TOTAL, SCHEDULES[schedule], name)
    expected, optimizer = unscheduled(name)
    train_by_hand(expected, optimizer, SCHEDULES[schedule])
    if name.startswith("fastfreeze"):  # its kernel's last bit is not the reference's in every step
        torch.testing.assert_close(model.state_dict(), expected.state_dict())
    else:
        assert_equal(model, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_layer_keeps_its_weights_and_nothing_else(name):
    model, optimizer, scheduler = trained(3, name=name)
    first = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in first]
    assert scheduler.frozen_layers == (0, 1)
    assert all(p.grad is None and not p.requires_grad and p not in optimizer.state for p in first)
    train(model, optimizer, scheduler, range(3, TOTAL))
    assert all(map(torch.equal, first, before))
    assert scheduler.frozen_layers == (0, 1, 2)


def test_a_thawed_layer_starts_with_new_state_and_what_was_fixed_by_hand_stays_so():
    model, optimizer, scheduler = made(SCHEDULES["thaws"])
    bias = model[0].bias.requires_grad_(False)
    train(model, optimizer, scheduler, range(TOTAL // 2))
    assert scheduler.frozen_layers == ()
    assert [p for p in model.parameters() if not p.requires_grad] == [bias]
    assert not any(p in optimizer.state for p in model[0].parameters())
    backward(model, 6)
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 1
    assert [optimizer.state[p]["step"] for p in optimizer.param_groups[3]["params"]] == [7, 7]


def written(*objects):
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@covering(
    name=list(OPTIMIZERS),
    schedule=["thaws", "unfreezes"],
    at=[2, 5, 7, TOTAL],
    scheduler_first=[False, True],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(name, schedule, at, scheduler_first):
    schedule = SCHEDULES[schedule]
    expected = made(schedule, name)
    train(*expected, range(at))
    states = written(*expected)
    train(*expected, range(at, TOTAL))
    again = model, optimizer, scheduler = made(schedule, name)
    for which in [0, 2, 1] if scheduler_first else [0, 1, 2]:
        again[which].load_state_dict(states[which])
    assert scheduler.current_step == at
    train(*again, range(at, TOTAL))
    assert_equal(model, expected[0])
    assert scheduler.state_dict() == expected[2].state_dict()
    assert scheduler.frozen_layers == expected[2].frozen_layers
    assert len(optimizer.state) == len(expected[1].state)


def test_going_back_thaws():
    model, optimizer, scheduler = trained(TOTAL)
    start = made(FREEZING)[2]
    scheduler.load_state_dict(start.state_dict())
    assert scheduler.frozen_layers == ()
    assert all(p.requires_grad for p in model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == start.get_last_lr()


def test_what_would_freeze_after_the_last_step_does_not():
    at_the_end = FreezeOutCycles(TOTAL, num_cycles=2, t_0=1.0)  # all but the head, at step 12
    assert trained(TOTAL, at_the_end)[2].frozen_layers == ()


def test_only_steps_of_the_optimizer_count():
    model, optimizer, scheduler = made(FREEZING)
    for _ in range(3):
        scheduler.step()
    assert scheduler.current_step == 0
    for step in range(4):
        backward(model, step)
        optimizer.step()
        for _ in range(2):  # as accelerate does with two processes
            scheduler.step()
    assert scheduler.current_step == scheduler.last_epoch == 4
    for step in range(4, 9):  # as once an epoch
        backward(model, step)
        optimizer.step()
    scheduler.step()
    assert scheduler.current_step == 9
    rates = enumerate(g["initial_lr"] for g in optimizer.param_groups)
    expected = [FREEZING.lr(9, rate, i, 4) for i, rate in rates]
    assert scheduler.get_last_lr() == pytest.approx(expected)
    assert expected == pytest.approx([group["lr"] for group in optimizer.param_groups])


class Wrapped(torch.optim.SGD):
    def step(self, closure=None):
        if closure is not None:
            closure()
        return super().step()


def test_a_step_of_a_subclass_and_of_its_parent_is_one():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on torch hooks the parent's
    model = net()
    optimizer = Wrapped(groups_of(model), lr=0.1)
    scheduler = FreezeScheduler(optimizer, FREEZING)
    for step in range(3):
        backward(model, step)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        optimizer.step()
        scheduler.step()
    assert scheduler.current_step == 3


@pytest.mark.parametrize("name", ["AdamW fused", "AdamW"])
def test_a_step_that_a_scaler_skips_does_not_count(name):
    model, optimizer, scheduler = made(FREEZING, name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for step in range(4):
        backward(model, step)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(torch.inf if step == 1 else 4.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.current_step == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: s], ids=["copy", "itself"])
def test_a_copy_goes_on_with_its_own_optimizer(copied):
    model, _, scheduler = trained(4)
    model, scheduler = copied((model, scheduler))
    train(model, scheduler.optimizer, scheduler, range(4, TOTAL))
    assert_equal(model, trained(TOTAL)[0])


def test_rates_in_tensors_stay_the_same_tensors():
    model = net()
    optimizer = torch.optim.AdamW(
        groups_of(model), lr=torch.tensor(0.02), weight_decay=0.1, foreach=False
    )
    scheduler = FreezeScheduler(optimizer, FREEZING)
    held = [group["lr"] for group in optimizer.param_groups]  # torch has one for all of them
    train(model, optimizer, scheduler, range(5))
    assert all(group["lr"] is h for group, h in zip(optimizer.param_groups, held, strict=True))
    expected = trained(5)
    assert [h.item() for h in held] == pytest.approx(expected[2].get_last_lr())
    torch.testing.assert_close(model.state_dict(), expected[0].state_dict())


def test_a_warm_up_comes_before_it():
    def run():
        model = net()
        optimizer = torch.optim.AdamW(groups_of(model), lr=0.02)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        both = [warm_up, FreezeScheduler(optimizer, FREEZING)]
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, both, [3])

    whole, again = run(), run()
    train(*whole, range(2))
    for part, state in zip(again, [o.state_dict() for o in copy.deepcopy(whole)], strict=True):
        part.load_state_dict(state)
    for part in (whole, again):
        train(*part, range(2, TOTAL + 3))
    assert again[2]._schedulers[1].current_step == TOTAL
    assert again[2]._schedulers[1].frozen_layers == (0, 1, 2)
    assert_equal(again[0], whole[0])


def test_biases_and_norms_form_groups_of_their_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    groups = groups_of(model, no_decay=True)
    found = [(g["layer_index"], g.get("weight_decay"), len(g["params"])) for g in groups]
    assert found == [(0, None, 1), (0, 0.0, 3), (1, None, 1)]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    scheduler = FreezeScheduler(optimizer, FREEZING)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1]
    train(model, optimizer, scheduler, range(6))
    assert scheduler.frozen_layers == (0,)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True]


def test_it_is_told_that_somebody_else_changes_the_rates():
    model, optimizer, scheduler = trained(2)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, 2)
    optimizer.step()
    other.step()
    with pytest.warns(FastfreezeWarning, match="lr of parameter group 2 is .* was set to"):
        scheduler.step()
    backward(model, 3)
    optimizer.step()
    other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()  # once


def test_a_plan_for_another_schedule_is_told():
    groups = groups_of(net(), FREEZING)
    with pytest.warns(FastfreezeWarning, match="the plan tells of another run"):
        FreezeScheduler(torch.optim.AdamW(groups), Cosine(TOTAL))


def test_layers_that_an_earlier_run_has_frozen_are_told():
    model, optimizer, scheduler = trained(TOTAL)
    optimizer = torch.optim.AdamW(optimizer.param_groups)
    scheduler = FreezeScheduler(optimizer, Cosine(TOTAL))
    with pytest.warns(FastfreezeWarning, match=r"layers 0\.\.2 do not train"):
        train(model, optimizer, scheduler, range(1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pair], ids=["copy", "itself"])
def test_a_run_resumed_in_the_same_process_thaws_what_the_first_one_froze(copied):
    schedule = SCHEDULES["thaws"]
    model, optimizer, scheduler = trained(3, schedule)
    model, optimizer = copied((model, optimizer))
    optimizer = torch.optim.AdamW(optimizer.param_groups)
    again = FreezeScheduler(optimizer, schedule)
    again.load_state_dict(scheduler.state_dict())
    assert again.frozen_layers == scheduler.frozen_layers == (0, 1, 2)
    train(model, optimizer, again, range(3, 6))
    assert all(p.requires_grad for p in model.parameters())


def plain(**attributes):
    optimizer = torch.optim.AdamW(net().parameters(), lr=0.1)
    vars(optimizer).update(attributes)
    return optimizer


HIGH = Cosine(TOTAL, eta_min=0.2)
REFUSED = [
    (net, FREEZING, TypeError, "optimizer must be a torch.optim.Optimizer"),
    (plain, 100, TypeError, "schedule must be a fastfreeze Schedule, got 100"),
    (plain, FREEZING, ValueError, "group 0 has no 'layer_index'"),
    (lambda: plain(state=object()), Cosine(TOTAL), TypeError, "optimizer.state must be a dict"),
    (lambda: plain(inner=plain()), Cosine(TOTAL), TypeError, "got AdamW around another optimizer"),
    (lambda: plain(schedule=3), Cosine(TOTAL), ValueError, "without a schedule of its own, got Ad"),
    (plain, HIGH, ValueError, "parameter group 0"),
]


@pytest.mark.parametrize(("make", "schedule", "error", "words"), REFUSED)
def test_what_is_refused(make, schedule, error, words):
    with pytest.raises(error, match=words):
        FreezeScheduler(make(), schedule)


def test_more_steps_than_the_schedule_has_are_refused():
    model, optimizer, scheduler = trained(TOTAL)
    backward(model, TOTAL)
    optimizer.step()
    with pytest.raises(ValueError, match=r"taken 13 steps, and the schedule's total_steps is 12"):
        scheduler.step()
    with pytest.raises(ValueError, match=r"epoch must be in 0\.\.12, got 13"):
        scheduler.step(13)


def test_what_somebody_switches_on_is_switched_off_again():
    model, optimizer, scheduler = trained(3)
    before = model[0].weight.detach().clone()
    model.requires_grad_(True)
    train(model, optimizer, scheduler, range(3, 5))
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad
    assert model[0].weight not in optimizer.state


def test_steps_that_have_not_been_followed_are_saved():
    model, optimizer, scheduler = made(FREEZING)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    again = made(FREEZING)[2]
    again.load_state_dict(scheduler.state_dict())
    assert again.current_step == 0
    again.step()
    assert again.current_step == 4


def test_groups_that_came_later_are_refused():
    model, optimizer, scheduler = made(FREEZING)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    backward(model, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="must be the 4 groups that the schedule knows, got 5"):
        scheduler.step()


def changed(**entries):
    return lambda state: {**state, **entries}


OF_ANOTHER = torch.optim.lr_scheduler.StepLR(plain(), 1).state_dict()
BAD_STATES = [
    (lambda state: [state], TypeError, "must be one of a FreezeScheduler"),
    (lambda _: OF_ANOTHER, TypeError, "one of a"),
    (changed(schedule=Cosine(TOTAL).config()), ValueError, "must be of schedule"),
    (changed(last_epoch=TOTAL + 1), ValueError, r"must be in 0\.\.12, got 13"),
    (changed(last_epoch="3"), TypeError, "must be an int "),
    (changed(base_lrs=[0.1]), ValueError, "must be 4 rates"),
    (changed(base_lrs=[0.1, 0.1, 0.1, "x"]), TypeError, "must be a number"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(change, error, words):
    _, optimizer, scheduler = trained(5)
    state, rates = scheduler.state_dict(), [g["lr"] for g in optimizer.param_groups]
    with pytest.raises(error, match=words):
        scheduler.load_state_dict(change(made(FREEZING)[2].state_dict()))
    assert scheduler.state_dict() == state
    assert [g["lr"] for g in optimizer.param_groups] == rates


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_changes_are_the_steps_at_which_something_freezes_or_thaws(schedule):
    followed = FollowedGroups(schedule, [{**g, "lr": 0.1} for g in groups_of(net())])
    frozen = [followed.frozen_at(step) for step in range(TOTAL)]
    expected = {step for step in range(1, TOTAL) if frozen[step] != frozen[step - 1]}
    assert followed.changes - {TOTAL} == expected
