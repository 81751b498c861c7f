"""What is Adam's own in the optimizers: counts of steps, moments, and their checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastfreeze
from tests.optim.helpers import assert_equal_training, counts, net, train


def test_adamw_decays_as_it_does_whatever_it_loads():
    model = net()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    train(model, adam, 1)
    optimizer = fastfreeze.AdamW(model.parameters())
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def count_is(count, in_place):
    """Also 0, with moments that are there."""

    def edit(optimizer, _):
        for state in optimizer.state.values():
            if in_place:
                state["step"].fill_(count)
            else:
                state["step"] = torch.tensor(count)

    return edit


CHANGES = {
    "count 0": count_is(0.0, in_place=False),
    "count 0 in place": count_is(0.0, in_place=True),
    "count 7": count_is(7.0, in_place=False),
    "count 7 in place": count_is(7.0, in_place=True),
    "list of betas": lambda _, betas: betas.__setitem__(0, 0.2),
    "a flag of None": lambda optimizer, _: optimizer.param_groups[0].update(maximize=None),
}


@pytest.mark.parametrize("edit", CHANGES.values(), ids=CHANGES)
def test_an_edit_counts(edit):
    found, counted = [], []
    for make in (fastfreeze.Adam, torch.optim.Adam):
        model, betas = net(), [0.9, 0.999]
        optimizer = make([{"params": model.parameters(), "betas": betas}], lr=0.01)
        train(model, optimizer, 2)
        edit(optimizer, betas)
        train(model, optimizer, 3, start=2)
        found.append(model)
        counted.append(counts(optimizer))
    assert_equal_training(*found, rtol=1e-5, atol=1e-6)
    assert counted[0] == counted[1]


def test_tensors_as_betas_make_a_new_plan_where_they_change_and_no_other():
    found, plans = [], []
    for make in (fastfreeze.Adam, torch.optim.Adam):
        model, betas = net(), [torch.tensor(0.9), torch.tensor(0.999)]
        optimizer = make(model.parameters(), lr=torch.tensor(0.01), betas=tuple(betas))
        for step in range(6):
            if step == 4:
                betas[1].fill_(0.99)
            train(model, optimizer, 1, start=step)
            plans.append(getattr(optimizer, "_runtime", None))
        found.append(model)
    assert_equal_training(*found, rtol=1e-5, atol=1e-6)
    kept = [plans[i] is plans[i + 1] for i in range(5)]
    assert kept == [True, True, True, False, True]


def test_amsgrad_may_be_switched_on_later():
    model = net()
    optimizer = fastfreeze.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["amsgrad"] = True
    train(model, optimizer, 1, start=2)
    for state in optimizer.state.values():
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_sparse_gradients_are_refused_as_torch_does(backend):
    """Also where a dense one was taken before."""
    weight = nn.Parameter(torch.ones(5, 3))
    optimizer = fastfreeze.AdamW([weight], backend=backend)
    for steps in range(2):
        before, weight.grad = weight.detach().clone(), torch.ones(5, 3).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(weight, before)
        assert counts(optimizer) == [steps or None]
        weight.grad = torch.ones(5, 3)
        optimizer.step()


EDITS = {
    "a single beta": ({"betas": 0.9}, "parameter group 0 has bad values in .*'betas': 0.9"),
    "eps": ({"eps": None}, "parameter group 0 has bad values in .*'eps': None"),
    "lr": ({"lr": None}, "lr of parameter group 0 must be a number, got None"),
}


@pytest.mark.parametrize(("change", "match"), EDITS.values(), ids=EDITS)
def test_edits_that_are_refused(change, match):
    model = net()
    optimizer = fastfreeze.AdamW(model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0].update(change)
    before = str(list(model.parameters()))
    with pytest.raises((TypeError, ValueError), match=match):
        train(model, optimizer, 1)
    assert str(list(model.parameters())) == before
