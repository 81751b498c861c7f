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


def sgd(groups, schedule=None, lr=0.1):
    return SGD(groups, lr=lr, schedule=schedule)


def told(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if issubclass(w.category, FastfreezeWarning)]


FREEZING = FreezeOut(20, t_0=0.3, scale_lr=False)
CYCLES = FreezeOutCycles(40, num_cycles=2, composition="thaw")
UNFREEZING = GradualUnfreezing(40, unfreeze_every=12)


def followed(schedule=FREEZING, steps=0, model=None):
    """A network, its plan, and an optimizer that follows it."""
    model = model or net()
    plan = planned(model, schedule)
    optimizer = sgd(plan.param_groups(), schedule)
    train(model, optimizer, steps)
    return model, plan, optimizer


def rates(schedule, make=sgd):
    return lambda: make(planned(net(), schedule).param_groups(), schedule)


def scheduler(groups, schedule):
    return FreezeScheduler(torch.optim.SGD(groups, lr=0.1), schedule)


def unfollowed(**kwargs):
    return lambda: sgd(planned(net(), FREEZING).param_groups(), **kwargs)


def a_second_run():
    model, plan, _ = followed(steps=20)
    train(model, sgd(plan.param_groups(), FREEZING), 1)


def a_second_run_of_no_plan():
    model, *_ = followed(steps=20)
    train(model, SGD(model.parameters(), lr=0.1, total_steps=9), 1)


def thawed_by_hand():
    model, _, optimizer = followed(steps=10)
    frozen = model[0].weight.clone()
    model.requires_grad_(True)
    train(model, optimizer, 10)  # told once
    assert torch.equal(frozen, model[0].weight)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.layers, self.use_reentrant = net(), use_reentrant

    def forward(self, x):
        x, *rest = self.layers[0](x), *self.layers[1:3]
        for layer in rest:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return self.layers[3](x)


def checkpointed(use_reentrant):
    model, schedule = Checkpointed(use_reentrant), FreezeOut(400, t_0=0.3, scale_lr=False)
    names = [f"layers.{i}" for i in range(4)]
    plan = fastfreeze.split(model, layers=names, schedule=schedule, lr=0.1)
    train(model, sgd(plan.param_groups(), schedule), 40)


NO_GRADIENT = r"layers 1\.\.2 should train, and have had no gradient since.* use_reentrant=False"
TOLD = {
    "a plan without its schedule": (
        unfollowed(), r"split\(\) was given schedule=FreezeOut, and this optimizer has none"
    ),
    "another schedule": (unfollowed(schedule=FreezeOut(20)), "Pass both the same schedule"),
    "another rate": (unfollowed(lr=0.3, schedule=FREEZING), r"was given lr=0.1, .* from lr=0.3"),
    "many times the rate": (
        rates(FreezeOut(20, t_0=0.3)), r"^layers 0 start at .* 37 times .*, 3\.7 instead of 0\.1"
    ),
    "in a scheduler": (rates(FreezeOut(20, t_0=0.3), scheduler), "^layers 0 start at .* 37 times"),
    "a second run": (a_second_run, r"layers 0\.\.2 do not train.*requires_grad_\(True\)"),
    "of no plan": (a_second_run_of_no_plan, r"layers 0 do not train"),
    "thawed by hand": (thawed_by_hand, r"layers 0\.\.2 are frozen by the schedule"),
    "reentrant checkpoints": (lambda: checkpointed(True), NO_GRADIENT),
}  # fmt: skip


@pytest.mark.parametrize(("act", "message"), TOLD.values(), ids=TOLD)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_is_told(act, message):
    (text,) = told(act)
    assert re.search(message, text)


def test_a_warning_points_to_the_call():
    with pytest.warns(FastfreezeWarning) as caught:
        SGD(planned(net(), FREEZING).param_groups(), lr=0.1)
    assert caught[0].filename == __file__


def layers_that_the_user_fixes():
    model, plan, _ = followed()
    model[0].requires_grad_(False)
    sgd(plan.param_groups(), FREEZING)


def a_run_that_goes_on():
    model, plan, first = followed(steps=10)
    second = sgd(plan.param_groups(), FREEZING)
    second.load_state_dict(first.state_dict())
    train(model, second, 10)


def a_second_run_that_thaws_by_its_schedule():
    model, plan, _ = followed(UNFREEZING, 5)
    train(model, sgd(plan.param_groups(), UNFREEZING), 40)
    assert all(p.requires_grad for p in model.parameters())


def thawed_between_runs():
    model, plan, _ = followed(steps=20)
    model.requires_grad_(True)
    train(model, sgd(plan.param_groups(), FREEZING), 1)


def fixed_after_a_thaw():
    model, *_ = followed(steps=20)
    model.requires_grad_(True)
    model[0].requires_grad_(False)
    planned(model, FREEZING)
    train(model, SGD(model.parameters(), lr=0.1), 1)


def gradients_in_turn():
    """As of networks that train in turn: theirs are missing for some steps."""
    schedule = FreezeOut(60, t_0=0.3, scale_lr=False)
    model, _, optimizer = followed(schedule)
    for step in range(50):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        if step % 10:
            model[2].zero_grad()
        optimizer.step()


SILENT = {
    "followed": followed,
    "split without a schedule": lambda: sgd(planned(net(), None, None).param_groups(), FREEZING),
    "a tensor's rate": lambda: SGD(planned(net(), None).param_groups(), lr=torch.tensor(0.1)),
    "the paper's rates": rates(FreezeOut(20, t_0=0.5)),
    "unscaled rates": rates(FreezeOut(20, t_0=0.1, scale_lr=False), scheduler),
    "thawed in cycles": lambda: followed(CYCLES, 40),
    "checkpoints that are not reentrant": lambda: checkpointed(False),
    "layers that the user fixes": layers_that_the_user_fixes,
    "a run that goes on": a_run_that_goes_on,
    "a second run that thaws by its schedule": a_second_run_that_thaws_by_its_schedule,
    "thawed between runs": thawed_between_runs,
    "fixed after a thaw": fixed_after_a_thaw,
    "gradients in turn": gradients_in_turn,
}


@pytest.mark.parametrize("act", SILENT.values(), ids=SILENT)
def test_nothing_to_tell(act):
    assert told(act) == []


def test_what_is_no_groups_of_a_plan():
    model, schedule = net(), Frozen(20, until="2")
    plan = planned(model, schedule)
    with pytest.raises(ValueError, match=r"until='2' is for a plan to resolve: .*plan\.schedule"):
        SGD(plan.param_groups(), lr=0.1, schedule=schedule)
    assert all(p.requires_grad for p in model.parameters())
    optimizer = SGD(plan.param_groups(), lr=0.1, schedule=plan.schedule)
    assert optimizer.frozen_layers == (0, 1)
    with pytest.raises(TypeError, match=r"pass its groups, as plan\.param_groups\(\) gives them"):
        SGD(plan, lr=0.1)
