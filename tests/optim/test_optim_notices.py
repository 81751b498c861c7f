"""What SGD tells of set-ups that train something else than they seem to, and when it is silent."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastfreeze
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.optim import SGD
from fastfreeze.schedule import FreezeOut, FreezeOutCycles, Frozen, GradualUnfreezing
from tests.nets import linears
from tests.optim.helpers import train


def net():
    return linears(6, 6, 6, 6, 6)


def planned(model, schedule, lr=0.1, **kwargs):
    return fastfreeze.split(model, layers=["0", "1", "2", "3"], schedule=schedule, lr=lr, **kwargs)


def told(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if issubclass(w.category, FastfreezeWarning)]


FREEZING = FreezeOut(20, t_0=0.3, scale_lr=False)
THAWING = {
    "cycles": FreezeOutCycles(40, num_cycles=2, composition="thaw"),
    "unfreezing": GradualUnfreezing(40, unfreeze_every=12),
}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0.1}, r"split\(\) was given schedule=FreezeOut, and this optimizer has none"),
        ({"lr": 0.1, "schedule": FreezeOut(20, t_0=0.5)}, "Pass both the same schedule"),
        ({"lr": 0.3, "schedule": FREEZING}, r"was given lr=0.1, .* starts from lr=0.3"),
    ],
    ids=["no schedule", "another schedule", "another rate"],
)
def test_a_plan_that_is_not_followed(kwargs, message):
    groups = planned(net(), FREEZING).param_groups()
    with pytest.warns(FastfreezeWarning, match=message) as caught:
        SGD(groups, **kwargs)
    assert caught[0].filename == __file__


def different_rates(groups):
    return [{**group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)]


def a_later_run():
    plan = planned(net(), FREEZING)
    plan.param_groups()
    SGD(plan.model.parameters(), lr=0.01)


def layers_that_the_user_fixes():
    model = net()
    groups = planned(model, FREEZING).param_groups()
    model[0].requires_grad_(False)
    SGD(groups, lr=0.1, schedule=FREEZING)


SILENT = {
    "followed": lambda: SGD(planned(net(), FREEZING).param_groups(), lr=0.1, schedule=FREEZING),
    "split without a schedule": lambda: SGD(
        planned(net(), None, None).param_groups(), lr=0.1, schedule=FREEZING
    ),
    "a tensor's rate": lambda: SGD(planned(net(), None).param_groups(), lr=torch.tensor(0.1)),
    "rates by layer": lambda: SGD(
        different_rates(planned(net(), FREEZING).param_groups()), lr=0.3, schedule=FREEZING
    ),
    "groups of no plan": lambda: SGD(planned(net(), FREEZING).model.parameters(), lr=0.1),
    "a later run": a_later_run,
    "layers that the user fixes": layers_that_the_user_fixes,
}


@pytest.mark.parametrize("make", SILENT.values(), ids=SILENT)
def test_nothing_to_tell(make):
    assert told(make) == []


TIMES = {
    "FreezeOut": (
        FreezeOut(20, t_0=0.3),
        r"layers 0 start at .* 37 times .*, 3\.7 instead of 0\.1",
    ),
    "cycles": (FreezeOutCycles(20, num_cycles=2, t_0=0.2), r"layers 0 start at up to 125 times"),
    "the paper's": (FreezeOut(20, t_0=0.5), None),
    "unscaled": (FreezeOut(20, t_0=0.1, scale_lr=False), None),
    "decayed": (FreezeOut(20, t_0=0.3, layer_decay=0.5), None),
}


@pytest.mark.parametrize(("schedule", "message"), TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("how", ["SGD", "FreezeScheduler"])
def test_rates_of_many_times_what_was_asked_for(how, schedule, message):
    groups = planned(net(), schedule).param_groups()
    if how == "SGD":
        messages = told(lambda: SGD(groups, lr=0.1, schedule=schedule))
    else:
        optimizer = torch.optim.SGD(groups, lr=0.1)
        messages = told(lambda: FreezeScheduler(optimizer, schedule))
    assert len(messages) == (message is not None)
    assert all(re.match(message, text) for text in messages)


def test_a_name_that_no_plan_has_resolved_changes_nothing():
    model, schedule = net(), Frozen(20, until="2")
    plan = planned(model, schedule)
    with pytest.raises(ValueError, match=r"until='2' is for a plan to resolve: .*plan\.schedule"):
        SGD(plan.param_groups(), lr=0.1, schedule=schedule)
    assert all(p.requires_grad for p in model.parameters())
    optimizer = SGD(plan.param_groups(), lr=0.1, schedule=plan.schedule)
    assert optimizer.frozen_layers == (0, 1)


def test_a_second_run_thaws_what_the_first_one_left_frozen():
    model, schedule = net(), THAWING["unfreezing"]
    plan = planned(model, schedule)
    train(model, SGD(plan.param_groups(), lr=0.1, schedule=schedule), 5)
    train(model, SGD(plan.param_groups(), lr=0.1, schedule=schedule), 40)
    assert all(p.requires_grad for p in model.parameters())


def test_an_earlier_run_has_frozen_layers():
    model = net()
    plan = planned(model, FREEZING)
    first = SGD(plan.param_groups(), lr=0.1, schedule=FREEZING)
    train(model, first, 20)
    with pytest.warns(
        FastfreezeWarning, match=r"layers 0\.\.2 do not train.*requires_grad_\(True\)"
    ):
        train(model, SGD(plan.param_groups(), lr=0.1, schedule=FREEZING), 1)
    with pytest.warns(FastfreezeWarning, match=r"layers 0 do not train"):  # of groups of no plan
        train(model, SGD(model.parameters(), lr=0.1, total_steps=9), 1)
    model.requires_grad_(True)
    assert told(lambda: train(model, SGD(plan.param_groups(), lr=0.1, schedule=FREEZING), 1)) == []


def test_a_run_that_goes_on_from_a_checkpoint_is_no_second_run():
    model = net()
    plan = planned(model, FREEZING)
    first = SGD(plan.param_groups(), lr=0.1, schedule=FREEZING)
    train(model, first, 10)

    def resume():
        second = SGD(plan.param_groups(), lr=0.1, schedule=FREEZING)
        second.load_state_dict(first.state_dict())
        train(model, second, 10)

    assert told(resume) == []


def test_layers_fixed_by_hand_after_a_thaw_are_no_earlier_runs():
    model = net()
    train(model, SGD(planned(model, FREEZING).param_groups(), lr=0.1, schedule=FREEZING), 20)
    model.requires_grad_(True)
    model[0].requires_grad_(False)
    assert told(lambda: planned(model, FREEZING)) == []
    assert told(lambda: train(model, SGD(model.parameters(), lr=0.1), 1)) == []


def test_a_plan_is_no_list_of_parameters():
    with pytest.raises(TypeError, match=r"pass its groups, as plan\.param_groups\(\) gives them"):
        SGD(planned(net(), FREEZING), lr=0.1)


def test_a_layer_is_thawed_by_hand():
    model = net()
    optimizer = SGD(planned(model, FREEZING).param_groups(), lr=0.1, schedule=FREEZING)
    train(model, optimizer, 10)
    frozen = model[0].weight.clone()
    model.requires_grad_(True)
    with pytest.warns(FastfreezeWarning, match=r"layers 0\.\.2 are frozen by the schedule"):
        train(model, optimizer, 1)
    assert torch.equal(frozen, model[0].weight)
    assert told(lambda: train(model, optimizer, 9)) == []  # once


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.layers, self.use_reentrant = net(), use_reentrant

    def forward(self, x):
        x, *rest = self.layers[0](x), *self.layers[1:3]
        for layer in rest:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return self.layers[3](x)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_without_gradients_since_a_freeze_are_named(use_reentrant):
    model, schedule = Checkpointed(use_reentrant), FreezeOut(400, t_0=0.3, scale_lr=False)
    names = [f"layers.{i}" for i in range(4)]
    plan = fastfreeze.split(model, layers=names, schedule=schedule, lr=0.1)
    optimizer = SGD(plan.param_groups(), lr=0.1, schedule=schedule)
    messages = told(lambda: train(model, optimizer, 40))
    assert len(messages) == use_reentrant
    for message in messages:
        assert "layers 1..2 should train, and have had no gradient since" in message
        assert "use_reentrant=False" in message


@pytest.mark.parametrize("schedule", THAWING.values(), ids=THAWING)
def test_a_thaw_by_the_schedule_is_silent(schedule):
    model = net()
    optimizer = SGD(planned(model, schedule).param_groups(), lr=0.1, schedule=schedule)
    assert told(lambda: train(model, optimizer, 40)) == []


def test_gradients_in_turn_are_no_failure():
    """As of networks that train in turn: theirs are missing for some steps."""
    model, schedule = net(), FreezeOut(60, t_0=0.3, scale_lr=False)
    optimizer = SGD(planned(model, schedule).param_groups(), lr=0.1, schedule=schedule)

    def every_other_step():
        for step in range(50):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).square().mean().backward()
            if step % 10:
                model[2].zero_grad()
            optimizer.step()

    assert told(every_other_step) == []
