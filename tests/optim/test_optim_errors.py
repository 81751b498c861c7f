"""What optimizers refuse: each error says what was expected, and nothing has changed."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.optim import SGD, AdamW
from fastfreeze.schedule import Constant, Cosine, FreezeOut
from tests.optim.helpers import assert_equal_training, layer_groups, net, same_bits, train, weights

FREEZING = FreezeOut(20, t_0=0.5)


def trained(schedule=FREEZING, steps=4, of=SGD, **kwargs):
    model = net()
    kwargs |= {"momentum": 0.9} if of is SGD else {}
    optimizer = of(layer_groups(model), lr=0.1, schedule=schedule, **kwargs)
    train(model, optimizer, steps)
    return model, optimizer


def seen(model, optimizer):
    """All that an error must leave as it is; objects that must stay the same by their identity."""
    return {
        "weights": [w.tolist() for w in weights(model)],
        "grads": [(p.requires_grad, id(p.grad)) for p in model.parameters()],
        "state": {
            id(p): {name: (id(t), t.tolist()) for name, t in state.items()}
            for p, state in optimizer.state.items()
        },
        "groups": [
            {**group, "id": id(group), "params": list(map(id, group["params"]))}
            for group in optimizer.param_groups
        ],
        "step": (optimizer.current_step, type(optimizer.current_step)),
        "frozen": {g: list(map(id, params)) for g, params in optimizer._frozen.items()},
    }


def assert_unchanged(model, optimizer, before):
    after = seen(model, optimizer)
    changed = [key for key in before if repr(after[key]) != repr(before[key])]  # nan is nan
    assert not changed


# Arguments.


ARGUMENTS = {
    "lr nan": (SGD, {"lr": math.nan}, ValueError, "lr must be >= 0, got nan"),
    "nesterov": (SGD, {"nesterov": True}, ValueError, "nesterov=True needs momentum > 0"),
    "for AdamW": (AdamW, {"differentiable": True}, ValueError, "use torch.optim.AdamW for it"),
    "backend": (SGD, {"backend": "gpu"}, ValueError, "backend must be one of"),
    "schedule": (SGD, {"schedule": 3}, TypeError, "schedule must be a fastfreeze Schedule, got 3"),
    "total": (SGD, {"schedule": Cosine(5), "total_steps": 6}, ValueError, "be the schedule's 5"),
    "no layers": (SGD, {"schedule": FreezeOut(5)}, ValueError, "group 0 has no 'layer_index'"),
    "eta_min": (SGD, {"schedule": Cosine(5, eta_min=0.5)}, ValueError, "eta_min must not exceed"),
    "momentum's dtype": (SGD, {"momentum_dtype": torch.half}, ValueError, "momentum_dtype must be"),
    "one beta": (AdamW, {"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
    "beta 1": (AdamW, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be .* < 1, got 1"),
    "eps": (AdamW, {"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    "state's dtype": (AdamW, {"state_dtype": torch.half}, ValueError, "state_dtype must be None"),
}


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(make, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(net().parameters(), **kwargs)


def test_hyperparameters_are_the_numbers_that_torch_takes():
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        for value in ("0.5", None, [0.1], 1j):
            with pytest.raises(TypeError, match=rf"^{name} must be a number, got "):
                SGD(net().parameters(), **{name: value})
        with pytest.raises(ValueError, match=rf"Tensor {name} must have one element, got .*\(2,\)"):
            SGD(net().parameters(), **{name: torch.ones(2)})
        for value in (1, np.float32(0.5), np.int64(1), torch.tensor(0.5)):
            ours, theirs = net(), net()
            kwargs = {"lr": 0.1, "momentum": 0.9, name: value}
            train(ours, SGD(ours.parameters(), **kwargs), 2)
            train(theirs, torch.optim.SGD(theirs.parameters(), foreach=False, **kwargs), 2)
            assert_equal_training(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"lr of parameter group 0 must be a number, got 'a'"):
        SGD([{"params": net().parameters(), "lr": "a"}], schedule=Cosine(5))


# What leaves all as it was.


def at(step):
    return lambda optimizer: setattr(optimizer, "current_step", step)


def adds(**group):
    extra = {"params": [torch.nn.Parameter(torch.ones(2))], **group}
    return lambda optimizer: optimizer.add_param_group(extra)


def group(state, **values):
    state["param_groups"][1].update(values)


def all_steps(state, step):
    for saved in state["param_groups"]:
        saved["step"] = step


def momentum(state, buffer):
    state["state"][2]["momentum_buffer"] = buffer


def load(change, *args, **kwargs):
    """A state with frozen layers, changed."""

    def act(optimizer):
        state = copy.deepcopy(trained(steps=15, of=type(optimizer))[1].state_dict())
        for buffer in range(6):  # frozen layers have none
            state["state"].setdefault(buffer, {})
        change(state, *args, **kwargs)
        optimizer.load_state_dict(state)

    return act


def of(state, make):
    state |= trained(steps=15, of=make)[1].state_dict()


OF_STEP = r"^current_step must be .*in 0\.\.20, got "
REFUSED = {
    "current_step 2.5": (at(2.5), TypeError, OF_STEP),
    "current_step bool": (at(True), TypeError, OF_STEP),
    "current_step float tensor": (at(torch.tensor(2.5)), TypeError, OF_STEP),
    "current_step -1": (at(-1), ValueError, OF_STEP),
    "current_step behind the end": (at(21), ValueError, OF_STEP),
    "initial_lr nan": (load(group, initial_lr=math.nan), ValueError, "group 1: initial_lr .* nan"),
    "initial_lr str": (load(group, initial_lr="x"), TypeError, "initial_lr of .* 1 must be a num"),
    "layer_index str": (load(group, layer_index="x"), TypeError, "layer_index of .* 1 .* 'x'"),
    "layer_index 3 of 3": (load(group, layer_index=3), ValueError, r"layer_index of .* in 0\.\.2"),
    "num_layers 0": (load(group, num_layers=0), ValueError, "num_layers of .* 1 .*>= 1, got 0"),
    "step -5": (load(all_steps, -5), ValueError, r"step of .* 0 must be in 0\.\.20, got -5"),
    "step str": (load(all_steps, "x"), TypeError, "step of .* 0 must be an int .* 'x'"),
    "one step of another": (load(group, step=-1), ValueError, "step of parameter group 1 .* -1"),
    "momentum float": (load(momentum, 3.0), ValueError, "momentum_buffer of .* 1 must be a ten"),
    "momentum shape": (load(momentum, torch.ones(2)), ValueError, "have its parameter's shape"),
    "state 3.0": (load(lambda s: s["state"].update({2: 3.0})), ValueError, "state in group 1"),
    "fewer groups": (load(lambda s: s["param_groups"].pop()), ValueError, "2, expected .* 3"),
    "fewer parameters": (
        load(lambda s: s["param_groups"][1]["params"].pop()), ValueError, "1 doesn't match .* 2"
    ),
    "no groups": (load(lambda s: s.pop("param_groups")), ValueError, "a list 'param_groups'"),
    "no state": (load(lambda s: s.pop("state")), ValueError, "must have a dict 'state'"),
    "a group is None": (
        load(lambda s: s["param_groups"].__setitem__(1, None)), ValueError, "group 1 must be a dict"
    ),
    "AdamW's": (load(of, AdamW), ValueError, "must be SGD's: parameter group 0 has no"),
    "another schedule": (
        load(lambda s: s.update(schedule={"name": "Cosine"})), ValueError, "saved under schedule"
    ),
    "group's layer_index str": (adds(layer_index="a"), TypeError, "layer_index of .* 3 .* 'a'"),
    "group's no layer_index": (adds(), ValueError, "no 'layer_index'"),
    "group's layer_index 3 of 3": (
        adds(layer_index=3, num_layers=3), ValueError, r"group 3 .* 0\.\.2, .* got 3"
    ),
    "group's num_layers": (
        adds(layer_index=0, num_layers="a"), TypeError, "num_layers of .* 3 .* 'a'"
    ),
    "group's lr": (adds(layer_index=0, lr="a"), TypeError, "lr of .* 3 must be a number, got 'a'"),
}  # fmt: skip


def kept(state, without=None, **values):
    state["state"][4].update(values)
    state["state"][4].pop(without, None)


HALF = r"must have exp_avg and exp_avg_sq, got none for \['exp_avg_sq'\]"
REFUSED_BY_ADAM = {
    "SGD's": (load(of, SGD), ValueError, "state_dict must be AdamW's: parameter group 0 has no"),
    "no count": (load(kept, "step"), TypeError, "step of parameter 4"),
    "count -1": (load(kept, step=-1), ValueError, "step of parameter 4 must be >= 0, got -1"),
    "count str": (load(kept, step="3"), TypeError, "step of parameter 4 must be a number, got '3'"),
    "two counts": (load(kept, step=torch.ones(2)), ValueError, "step of .* 4 must have one el"),
    "half of the moments": (load(kept, "exp_avg_sq"), ValueError, HALF),
    "another shape": (
        load(kept, exp_avg=torch.ones(3)), ValueError, r"a exp_avg .* shape \(5, 33\), got \(3,\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("of", "act", "error", "message"),
    [(SGD, *row) for row in REFUSED.values()] + [(AdamW, *row) for row in REFUSED_BY_ADAM.values()],
    ids=[*REFUSED, *(f"Adam, {name}" for name in REFUSED_BY_ADAM)],
)
def test_what_is_refused_changes_nothing(of, act, error, message):
    wide = {"momentum_dtype": torch.float32} if of is SGD else {}
    model, optimizer = trained(of=of, **wide)
    before = seen(model, optimizer)
    with pytest.raises(error, match=message):
        act(optimizer)
    assert_unchanged(model, optimizer, before)
    expected, straight = trained(of=of, **wide)
    train(expected, straight, 16, start=4)
    train(model, optimizer, 16, start=4)
    assert same_bits(weights(model), weights(expected))


def test_current_step_is_an_int_and_without_a_schedule_any():
    optimizer = SGD(net().parameters())
    for step, error in ((-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match=r"^current_step must be .*>= 0, got "):
            optimizer.current_step = step
    for step in (3, np.int64(3), np.array(3), torch.tensor(3), 10**6):
        optimizer.current_step = step
        assert (optimizer.current_step, type(optimizer.current_step)) == (step, int)


def test_current_step_stays_if_the_groups_do_not_fit():
    model, optimizer = trained()
    optimizer.param_groups[1]["initial_lr"] = -1.0
    before = seen(model, optimizer)
    with pytest.raises(ValueError, match=r"group 1: initial_lr must be finite and >= 0, got -1\.0"):
        optimizer.current_step = 9
    assert_unchanged(model, optimizer, before)


def test_steps_off_the_schedule():
    for steps, change, message in [
        (1, {"lr": 0.5}, r"lr of parameter group 0 must be .* got 0\.5"),
        (20, {}, "after the schedule's total_steps=20"),
    ]:
        model, optimizer = trained(Cosine(20), steps)
        optimizer.param_groups[0].update(change)
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            train(model, optimizer, 1)
        assert same_bits(weights(model), before)


# Checkpoints.


def test_what_is_no_state_and_a_step_without_a_schedule():
    model, optimizer = trained(schedule=None)
    before = seen(model, optimizer)
    for state in (None, 3, [("state", {})], "state"):
        with pytest.raises(TypeError, match=r"state_dict must be a dict, as .* gives it, got"):
            optimizer.load_state_dict(state)
    state = copy.deepcopy(optimizer.state_dict())
    all_steps(state, -5)
    with pytest.raises(ValueError, match=r"step of parameter group 0 must be >= 0, got -5"):
        optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)


def test_different_steps_are_told():
    for steps, words in [((4, 5, 4), r"\[4, 5\]"), ((None, 4, 4), r"\[None, 4\]")]:
        model, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        for group, step in zip(state["param_groups"], steps, strict=True):
            group["step"] = step
        optimizer.current_step = 7
        match = rf"different steps, {words}: the schedule goes on from step 7"
        with pytest.warns(FastfreezeWarning, match=match):
            optimizer.load_state_dict(state)
        train(model, optimizer, 13)


def test_momentum_may_be_none():
    """As torch saves it in older versions, before a parameter's first step."""
    ours, theirs = net(), net()
    optimizers = [
        SGD(ours.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, foreach=False),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        state = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9).state_dict()
        state["state"] = {i: {"momentum_buffer": None} for i in range(6)}
        optimizer.load_state_dict(state)
        train(model, optimizer, 3)
    assert_equal_training(ours, theirs)


def test_what_hooks_make_of_a_state_is_checked_and_they_see_it_whole():
    state = copy.deepcopy(trained(steps=15)[1].state_dict())
    model, optimizer = trained(momentum_dtype=torch.float32)
    before = seen(model, optimizer)

    def spoil(_, state_dict):
        changed = copy.deepcopy(state_dict)
        group(changed, initial_lr=-1.0)
        return changed

    hook = optimizer.register_load_state_dict_pre_hook(spoil)
    with pytest.raises(ValueError, match=r"group 1: initial_lr .* -1\.0"):
        optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)
    hook.remove()
    found = []

    def look(optimizer):
        groups = optimizer.param_groups
        found.append((optimizer.current_step, optimizer.frozen_layers, groups[0]["step"]))
        raise KeyError("the hook's own")

    hook = optimizer.register_load_state_dict_post_hook(look)
    for _ in range(2):  # nothing of ours is left behind
        with pytest.raises(KeyError, match="the hook's own"):
            optimizer.load_state_dict(state)
    assert found == [(15, (0, 1), 15)] * 2
    hook.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {}})
    optimizer.load_state_dict(state)
    assert not optimizer.state


# Groups under a schedule.


def append(optimizer):
    extra = {**optimizer.param_groups[0], "params": [torch.nn.Parameter(torch.ones(2))]}
    optimizer.param_groups.append(extra)


BY_HAND = [(lambda o: o.param_groups.pop(0), 2), (append, 4), (lambda o: o.param_groups.clear(), 0)]
TRIES = {
    "step": lambda o: o.step(),
    "current_step": lambda o: setattr(o, "current_step", 2),
    "add_param_group": lambda o: o.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(3))], "layer_index": 0}
    ),
    "load_state_dict": lambda o: o.load_state_dict(trained(o.schedule)[1].state_dict()),
    "state_dict": lambda o: o.state_dict(),
    "frozen_layers": lambda o: o.frozen_layers,
}


@pytest.mark.parametrize("attempt", TRIES.values(), ids=TRIES)
def test_groups_edited_by_hand_are_refused(attempt):
    for edit, count in BY_HAND:
        model, optimizer = trained()
        edit(optimizer)
        before = seen(model, optimizer)
        message = rf"must be the 3 groups .*, got {count}: add groups with add_param_group, .* new"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                attempt(optimizer)
        assert_unchanged(model, optimizer, before)


def test_without_a_schedule_groups_may_be_edited():
    model, optimizer = trained(schedule=None)
    optimizer.param_groups.pop()
    append(optimizer)
    append(optimizer)
    train(model, optimizer, 2)


INITIAL_RATES = {
    "nan": (math.nan, ValueError, "group 1: initial_lr must be finite and >= 0, got nan"),
    "str": ("x", TypeError, "initial_lr of parameter group 1 must be a number, got 'x'"),
    "None": (None, TypeError, "initial_lr of parameter group 1 must be a number, got None"),
    "below eta_min": (1e-5, ValueError, "group 1: eta_min must not exceed .* 1e-05, got 0.001"),
    "two elements": (torch.ones(2), ValueError, r"initial_lr of .* 1 must have one .*\(2,\)"),
    "nan tensor": (torch.tensor(math.nan), ValueError, "group 1: initial_lr must be .* got nan"),
}


@pytest.mark.parametrize(("value", "error", "message"), INITIAL_RATES.values(), ids=INITIAL_RATES)
def test_a_bad_initial_rate_is_refused_at_the_next_step(value, error, message):
    closures = []
    for steps in (0, 3):
        model, optimizer = trained(Cosine(20, eta_min=1e-3), steps=steps)
        optimizer.param_groups[1]["initial_lr"] = value
        before = seen(model, optimizer)
        for _ in range(2):
            with pytest.raises(error, match=message):
                optimizer.step(lambda: closures.append(1))
        assert not closures
        assert_unchanged(model, optimizer, before)
        optimizer.param_groups[1]["initial_lr"] = 0.2
        train(model, optimizer, 2, start=steps)
        expected = Cosine(20, eta_min=1e-3).lr(steps + 2, 0.2)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(expected)
    del optimizer.param_groups[2]["initial_lr"]
    with pytest.raises(TypeError, match="initial_lr of parameter group 2 must be a number"):
        optimizer.step()


def test_rates_are_checked_in_copies_and_where_a_tensor_changes_and_else_not(monkeypatch):
    model, optimizer = trained(Cosine(20))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.step()
        other.param_groups[1]["initial_lr"] = math.nan
        with pytest.raises(ValueError, match="group 1: initial_lr must be finite"):
            other.step()
    with monkeypatch.context() as patch:
        patch.setattr("fastfreeze.optim.fused.check_group_rate", lambda *_: pytest.fail("checked"))
        train(model, optimizer, 2, start=4)
    rate = torch.tensor(0.2)
    optimizer.param_groups[0]["initial_lr"] = rate
    train(model, optimizer, 2, start=6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(Cosine(20).lr(8, 0.2))
    rate.fill_(math.nan)
    with pytest.raises(ValueError, match="group 0: initial_lr must be finite"):
        optimizer.step()


def test_a_schedule_may_begin_with_rates_of_zero():
    model, optimizer = trained(Constant(5), steps=0)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0
    train(model, optimizer, 5)
