"""States, copies and checkpoints of optimizers, in all that torch says of its own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.nn import Parameter

import fastfreeze
from tests.nets import linears
from tests.optim.conformance import (
    SHAPES,
    assert_same,
    every_input,
    every_pair,
    parameters,
    params_of,
    run,
    set_gradients,
    tensors_of,
)
from tests.optim.helpers import train


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_input
def test_training_goes_on_bit_for_bit(pair, kwargs):
    """From a state, a file, a state that torch's own has loaded and saved, and in a copy."""

    def made(make=pair.ours, like=None):
        params = parameters() if like is None else [Parameter(p.clone()) for p in like]
        return make(params, **copy.deepcopy(kwargs))

    def through_torch(state):
        rival = made(pair.theirs)
        rival.load_state_dict(copy.deepcopy(state))
        return rival.state_dict()

    whole = run(made(), 3)
    at = [p.detach().clone() for p in params_of(whole)]
    others = [copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    for through in (copy.deepcopy, saved_and_loaded, through_torch):
        others.append(made(like=at))
        others[-1].load_state_dict(through(whole.state_dict()))
    run(whole, 3, start=3)
    for other in others:
        assert all(map(torch.equal, tensors_of(other)["itself"], at))  # its memory is its own
        run(other, 3, start=3)
        for name, tensors in tensors_of(whole).items():
            assert all(map(torch.equal, tensors_of(other)[name], tensors)), name


@every_pair
def test_states_of_older_versions_load(pair):
    """Made before some of the flags were there, with numbers for steps."""
    optimizer = run(pair.ours(parameters(), **pair.keeping), 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for flag in pair.info.not_og_supported_flags:
            group.pop(flag, None)
    for kept in state["state"].values():
        kept |= {name: int(kept[name]) for name in kept if name == "step"}
    older = pair.ours([Parameter(p.detach().clone()) for p in params_of(optimizer)], **pair.keeping)
    older.load_state_dict(state)
    assert_same(run(older, 3, start=3), run(optimizer, 3, start=3))


@every_pair
def test_groups_of_other_sizes_are_refused(pair):
    optimizer = run(pair.ours(parameters(), **pair.keeping), 1)
    before = copy.deepcopy(optimizer.state_dict())
    for shapes in (SHAPES[:3], [*SHAPES, (2,)]):
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            optimizer.load_state_dict(pair.ours(parameters(shapes=shapes)).state_dict())
    two = pair.ours([{"params": [p]} for p in parameters(shapes=[(2,), (3,)])])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@every_pair
def test_hooks_of_states(pair):
    optimizer = run(pair.ours(parameters(), **pair.keeping), 2)
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save, pre"))
    optimizer.register_state_dict_post_hook(
        lambda o, s: {"seen": s["param_groups"][0]["step"], **s}
    )
    state = optimizer.state_dict()
    assert (called, state["seen"]) == (["save, pre"], 2)
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("load, post"))
    optimizer.load_state_dict(state)
    assert called[-1] == "load, post"
    assert list(tensors_of(optimizer)) == ["itself"]


@every_pair
def test_torch_goes_on_from_a_state_with_frozen_layers(pair):
    model, schedule = linears(6, 6, 6, 6, 6), fastfreeze.FreezeOut(20, t_0=0.5)
    plan = fastfreeze.split(model, torch.ones(3, 6), schedule=schedule, lr=0.01)
    optimizer = pair.ours(plan.param_groups(), **{**pair.keeping, "lr": 0.01}, schedule=schedule)
    train(model, optimizer, 8)
    assert optimizer.frozen_layers
    found = []
    for make in (pair.ours, pair.theirs):
        other = copy.deepcopy(model)
        groups = [{"params": list(layer.parameters())} for layer in other]
        successor = make(groups, **{**pair.keeping, "lr": 0.01})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the loaded state was saved under schedule")
            successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, successor, 3)
        for i in optimizer.frozen_layers:
            assert torch.equal(other[i].weight, model[i].weight)
        found.append(successor)
    assert_same(*found)


@every_pair
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)], ids=str)
def test_named_parameters(pair, named):
    names = [f"p{i}" for i in range(len(SHAPES))]

    def names_seen(make):
        first, second = (
            list(zip(names, parameters(), strict=True)) if has else parameters() for has in named
        )
        saved = run(make(first, **pair.keeping), 2)
        loaded = make(second, **pair.keeping)
        loaded.load_state_dict(saved.state_dict())
        run(loaded, 2, start=2)
        return [
            saved.state_dict()["param_groups"][0].get("param_names"),
            loaded.param_groups[0].get("param_names"),
        ]

    found = names_seen(pair.ours)
    assert found[0] == (names if named[0] else None)
    assert found == names_seen(pair.theirs)


@every_pair
@pytest.mark.parametrize("saved", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_the_flags_in_a_checkpoint_mean_nothing(pair, saved):
    """torch takes them over; with a GradScaler its fused step then fails."""

    def resumed(make, **flags):
        first = run(pair.theirs(parameters(), **pair.keeping, **saved), 2)
        state = first.state_dict()
        state["param_groups"][0] |= flags
        optimizer = make(params_of(first), **pair.keeping)
        optimizer.load_state_dict(state)
        return optimizer

    theirs = run(resumed(pair.theirs, foreach=None, fused=None), 3, start=2)
    ours, scaler = resumed(pair.ours), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2, 5):
        set_gradients(params_of(ours), step)
        scaler.scale(torch.ones(()))
        for p in params_of(ours):
            p.grad.mul_(4)
        scaler.step(ours)
        scaler.update()
    assert_same(ours, theirs)
