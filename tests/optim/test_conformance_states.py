"""States, copies and checkpoints of optimizers, in all that torch says of its own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import fastfreeze
from tests.covering import covering
from tests.optim.conformance import (
    IMPLEMENTATIONS,
    PAIRS,
    SHAPES,
    assert_same,
    every_configuration,
    every_input,
    every_pair,
    parameters,
    run,
    set_gradients,
    states,
    truth_of,
)


@every_configuration
def test_states_have_the_keys_of_torch(pair, kwargs):
    states = []
    for make in (pair.ours, pair.theirs):
        params = parameters(shapes=[(3, 3), (5,)])
        optimizer = make(params, **truth_of(copy.deepcopy(kwargs)))
        run(optimizer, params, 2)
        states.append(optimizer.state_dict())
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    assert set(ours["param_groups"][0]) == {*theirs["param_groups"][0], "step"}
    assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"] == [0, 1]
    assert ours["state"].keys() == theirs["state"].keys()
    for mine, other in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert mine.keys() == other.keys()


@every_configuration
@pytest.mark.parametrize("through", ["state_dict", "torch.save", "torch"])
def test_training_goes_on_from_a_state(pair, kwargs, through):
    def fresh(make=pair.ours):
        params = parameters()
        return params, make(params, **copy.deepcopy(kwargs))

    expected, whole = fresh()
    run(whole, expected, 8)
    params, optimizer = fresh()
    run(optimizer, params, 4)
    state = optimizer.state_dict()
    if through == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    if through == "torch":
        rival = pair.theirs(parameters(), **truth_of(copy.deepcopy(kwargs)))
        rival.load_state_dict(state)
        state = rival.state_dict()
    others, resumed = fresh()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    run(resumed, others, 4, start=4)
    assert all(torch.equal(p, q) for p, q in zip(others, expected, strict=True))


@every_input
def test_states_of_older_versions_load(pair, kwargs):
    """Made before some of the flags were there."""
    params = parameters()
    optimizer = pair.ours(params, **copy.deepcopy(kwargs))
    run(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for flag in pair.info.not_og_supported_flags:
            if flag != "maximize":
                group.pop(flag, None)
    others = [Parameter(p.detach().clone()) for p in params]
    older = pair.ours(others, **copy.deepcopy(kwargs))
    older.load_state_dict(state)
    for p, o in ((params, optimizer), (others, older)):
        run(o, p, 3, start=3)
    assert_same(older, optimizer)


@every_pair
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)], ids=str)
def test_named_parameters(pair, named):
    names = [f"p{i}" for i in range(len(SHAPES))]

    def names_seen(make):
        params, others = parameters(), parameters()
        first = list(zip(names, params, strict=True)) if named[0] else params
        second = list(zip(names, others, strict=True)) if named[1] else others
        saved = make(first, **pair.keeping)
        run(saved, params, 2)
        loaded = make(second, **pair.keeping)
        loaded.load_state_dict(saved.state_dict())
        run(loaded, others, 2, start=2)
        return [
            saved.state_dict()["param_groups"][0].get("param_names"),
            loaded.param_groups[0].get("param_names"),
        ]

    found = names_seen(pair.ours)
    assert found[0] == (names if named[0] else None)
    assert found == names_seen(pair.theirs)


@every_pair
def test_groups_of_other_sizes_are_refused(pair):
    optimizer = pair.ours(parameters(), **pair.keeping)
    run(optimizer, optimizer.param_groups[0]["params"], 1)
    before = copy.deepcopy(optimizer.state_dict())
    for shapes in (SHAPES[:3], [*SHAPES, (2,)]):
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            optimizer.load_state_dict(pair.ours(parameters(shapes=shapes)).state_dict())
    two = pair.ours([{"params": [p]} for p in parameters(shapes=[(2,), (3,)])])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        torch.testing.assert_close(after["state"][i], state)


@every_configuration
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_train_alike(pair, kwargs, clone):
    params = parameters()
    optimizer = pair.ours(params, **copy.deepcopy(kwargs))
    run(optimizer, params, 3)
    twin = clone(optimizer)
    others = [p for g in twin.param_groups for p in g["params"]]
    assert not {p.data_ptr() for p in params if p.numel()} & {
        p.data_ptr() for p in others if p.numel()
    }
    for o, p in ((optimizer, params), (twin, others)):
        run(o, p, 3, start=3)
    assert_same(twin, optimizer)


@every_pair
def test_hooks_of_states(pair):
    params = parameters()
    optimizer = pair.ours(params, **pair.keeping)
    run(optimizer, params, 2)
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save, pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mark": 1})
    state = optimizer.state_dict()
    assert (called, state["mark"]) == (["save, pre"], 1)
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("load, post"))
    optimizer.load_state_dict(state)
    assert called[-1] == "load, post"
    assert states(optimizer) == [{}] * len(params)


@covering(pair=PAIRS, saved=IMPLEMENTATIONS, loaded=IMPLEMENTATIONS)
def test_the_flags_in_a_checkpoint_mean_nothing(pair, saved, loaded):
    """torch takes them over; with a GradScaler its fused step then fails."""
    found = []
    for make, flags in ((pair.ours, loaded), (pair.theirs, {"foreach": False})):
        params = parameters()
        first = pair.theirs(params, **pair.keeping, **saved)
        run(first, params, 2)
        state = first.state_dict()
        state["param_groups"][0] |= (
            {"foreach": None, "fused": None} if make is not pair.ours else {}
        )
        optimizer = make(params, **pair.keeping, **flags)
        optimizer.load_state_dict(state)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(2, 5):
            set_gradients(params, step)
            if make is pair.ours:
                scaler.scale(torch.ones(()))
                for p in params:
                    p.grad.mul_(4)
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        found.append(optimizer)
    assert_same(*found)


@every_pair
def test_torch_goes_on_from_a_state_with_frozen_layers(pair):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(3, 6)).square().sum().backward()
            optimizer.step()

    model, schedule = net(), fastfreeze.FreezeOut(20, t_0=0.5)
    plan = fastfreeze.split(model, torch.ones(3, 6), schedule=schedule, lr=0.01)
    optimizer = pair.ours(plan.param_groups(), **{**pair.keeping, "lr": 0.01}, schedule=schedule)
    steps(model, optimizer, 8)
    assert optimizer.frozen_layers
    found = []
    for make in (pair.ours, pair.theirs):
        other = copy.deepcopy(model)
        groups = [{"params": list(layer.parameters())} for layer in other]
        successor = make(groups, **{**pair.keeping, "lr": 0.01})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the loaded state was saved under schedule")
            successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(other, successor, 3)
        for i in optimizer.frozen_layers:
            assert torch.equal(other[i].weight, model[i].weight)
        found.append(successor)
    assert_same(*found)
