"""What is Adam's own in the optimizers: counts of steps, moments, and their checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze import FreezeOut, FreezeOutCycles
from fastfreeze.layers.groups import check_scheduled_groups
from fastfreeze.schedule.segments import SegmentTable

TOTAL = 12
SCHEDULES = {
    "freezes": FreezeOut(TOTAL, t_0=0.25, scale_lr=False),
    "thaws": FreezeOutCycles(TOTAL, num_cycles=2, t_0=0.3, composition="thaw", scale_lr=False),
}
CLASSES = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
every_class = pytest.mark.parametrize("name", CLASSES)


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))


def groups_of(model, **options):
    return fastfreeze.split(model, torch.zeros(1, 6)).param_groups(**options)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def counts(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["step"].item() if p in optimizer.state else None for p in params]


def assert_same_weights(model, other, **tolerance):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def train_by_hand(model, optimizer, schedule):
    """What the schedule says, done to torch's optimizer in a loop."""
    segments = check_scheduled_groups(schedule, optimizer.param_groups)
    table = SegmentTable(segments, schedule.eta_min, schedule.warmup_steps)
    initial = torch.tensor([g["lr"] for g in optimizer.param_groups]).double().numpy()
    for step in range(TOTAL):
        frozen = table.frozen(step)
        for g, (group, lr) in enumerate(
            zip(optimizer.param_groups, table.lrs(step, initial), strict=True)
        ):
            group["lr"] = lr
            for p in group["params"]:
                p.requires_grad_(g not in frozen)
                if g in frozen:
                    optimizer.state.pop(p, None)
        train(model, optimizer, [step])


@every_class
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_freezes_and_thaws(name, schedule):
    model, expected = net(), net()
    optimizer = getattr(fastfreeze, name)(groups_of(model), lr=0.01, schedule=schedule)
    train(model, optimizer, range(TOTAL))
    theirs = CLASSES[name](groups_of(expected), lr=0.01)
    train_by_hand(expected, theirs, schedule)
    assert_same_weights(model, expected)
    assert counts(optimizer)[-2:] == [TOTAL, TOTAL]
    for p in (p for layer in optimizer.frozen_layers for p in model[layer].parameters()):
        assert p not in optimizer.state
        assert p.grad is None


@every_class
@pytest.mark.parametrize("at", [2, 5, 7, TOTAL])
def test_a_resumed_run_ends_bit_for_bit_like_the_whole(name, at):
    def made():
        model = net()
        make = getattr(fastfreeze, name)
        return model, make(groups_of(model), lr=0.01, amsgrad=True, schedule=SCHEDULES["thaws"])

    expected, whole = made()
    train(expected, whole, range(at))
    file = io.BytesIO()
    torch.save([expected.state_dict(), whole.state_dict()], file)
    train(expected, whole, range(at, TOTAL))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model, optimizer = made()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(at, TOTAL))
    assert_same_weights(model, expected, rtol=0, atol=0)
    assert counts(optimizer) == counts(whole)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_overflow_at_the_first_step_counts_for_nothing(backend):
    model = net()
    before = copy.deepcopy(model)
    optimizer = fastfreeze.AdamW(model.parameters(), lr=0.01, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(scale):
        loss = model(torch.ones(2, 6)).square().mean()
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(float("inf"))
    assert not optimizer.state
    assert_same_weights(model, before, rtol=0, atol=0)
    step(1.0)
    expected = copy.deepcopy(before)
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    expected(torch.ones(2, 6)).square().mean().backward()
    theirs.step()
    assert_same_weights(model, expected)
    assert counts(optimizer) == [1] * 6


@every_class
def test_late_gradients_begin_their_own_count(name):
    found = []
    for make in (getattr(fastfreeze, name), CLASSES[name]):
        model = net()
        optimizer = make(model.parameters(), lr=0.01)
        model[0].requires_grad_(False)
        train(model, optimizer, range(3))
        model[0].requires_grad_(True)
        train(model, optimizer, range(3, 5))
        assert counts(optimizer) == [2, 2, 5, 5, 5, 5]
        found.append(model)
    assert_same_weights(*found)


def test_16_bit_parameters_with_wide_state_follow_fp32():
    wide = [nn.Parameter(torch.linspace(-1, 1, 100))]
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in wide]
    ours = fastfreeze.AdamW(narrow, lr=0.01, state_dtype=torch.float32)
    theirs = torch.optim.AdamW(wide, lr=0.01)
    for step in range(5):
        for p, q in zip(narrow, wide, strict=True):
            p.grad = torch.randn(100, generator=torch.Generator().manual_seed(step)).bfloat16()
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    own, other = ours.state[narrow[0]], theirs.state[wide[0]]
    assert own["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(own["exp_avg"], other["exp_avg"])
    torch.testing.assert_close(own["exp_avg_sq"], other["exp_avg_sq"])
    again = fastfreeze.AdamW(narrow, lr=0.01, state_dtype=torch.float32)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(again.state[narrow[0]]["exp_avg_sq"], own["exp_avg_sq"])


def test_gradients_of_another_memory_format():
    found = []
    for make in (fastfreeze.AdamW, torch.optim.AdamW):
        p = nn.Parameter(torch.linspace(-1, 1, 120).reshape(2, 3, 4, 5))
        optimizer = make([p], lr=0.01)
        for step in range(3):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            kind = torch.channels_last if step else torch.contiguous_format
            p.grad = grad.contiguous(memory_format=kind)
            optimizer.step()
        found.append((p, optimizer.state[p]["exp_avg_sq"]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def numbers(state):
    """As torch 1.11 saved it."""
    for kept in state["state"].values():
        kept["step"] = int(kept["step"])
    for group in state["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)


FOREIGN = {
    "for-loop": ({"foreach": False}, lambda state: None),
    "fused": ({"fused": True}, lambda state: None),
    "old": ({"foreach": False}, numbers),
}


@every_class
@pytest.mark.parametrize(("flags", "change"), FOREIGN.values(), ids=FOREIGN)
def test_torchs_states_go_on(name, flags, change):
    expected = net()
    theirs = CLASSES[name](expected.parameters(), lr=0.01, **flags)
    train(expected, theirs, range(3))
    state, model = copy.deepcopy(theirs.state_dict()), copy.deepcopy(expected)
    change(state)
    optimizer = getattr(fastfreeze, name)(model.parameters())
    optimizer.load_state_dict(state)
    assert all(isinstance(kept["step"], torch.Tensor) for kept in optimizer.state.values())
    train(model, optimizer, range(3, 6))
    train(expected, theirs, range(3, 6))
    assert_same_weights(model, expected)
    assert counts(optimizer) == [6] * 6


def test_adamw_decays_as_it_does_whatever_it_loads():
    model = net()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    train(model, adam, range(1))
    optimizer = fastfreeze.AdamW(model.parameters())
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("count", [0.0, 7.0], ids=["0", "7"])
@pytest.mark.parametrize("in_place", [True, False])
def test_an_edited_count_counts(count, in_place):
    """Also 0, with moments that are there."""
    found = []
    for make in (fastfreeze.Adam, torch.optim.Adam):
        model = net()
        optimizer = make(model.parameters(), lr=0.01)
        train(model, optimizer, range(2))
        for state in optimizer.state.values():
            if in_place:
                state["step"].fill_(count)
            else:
                state["step"] = torch.tensor(count)
        train(model, optimizer, range(2, 5))
        assert counts(optimizer) == [count + 3] * 6
        found.append(model)
    assert_same_weights(*found)


def test_a_changed_list_of_betas_counts():
    found = []
    for make in (fastfreeze.Adam, torch.optim.Adam):
        model = net()
        betas = [0.9, 0.999]
        optimizer = make([{"params": model.parameters(), "betas": betas}], lr=0.01)
        train(model, optimizer, range(2))
        betas[0] = 0.2
        train(model, optimizer, range(2, 5))
        found.append(model)
    assert_same_weights(*found)


def test_tensors_as_betas_make_a_new_plan_where_they_change_and_no_other():
    found, plans = [], []
    for make in (fastfreeze.Adam, torch.optim.Adam):
        model, betas = net(), [torch.tensor(0.9), torch.tensor(0.999)]
        optimizer = make(model.parameters(), lr=torch.tensor(0.01), betas=tuple(betas))
        for step in range(6):
            if step == 4:
                betas[1].fill_(0.99)
            train(model, optimizer, [step])
            plans.append(getattr(optimizer, "_runtime", None))
        found.append(model)
    assert_same_weights(*found)
    kept = [plans[i] is plans[i + 1] for i in range(5)]
    assert kept == [True, True, True, False, True]


def test_amsgrad_may_be_switched_on_later():
    model = net()
    optimizer = fastfreeze.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    train(model, optimizer, range(2, 3))
    for state in optimizer.state.values():
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_groups_without_decay():
    found = []
    for make in (fastfreeze.AdamW, torch.optim.AdamW):
        model = net()
        optimizer = make(groups_of(model, no_decay=True), lr=0.01, weight_decay=0.5)
        train(model, optimizer, range(3))
        found.append(model)
    assert_same_weights(*found)


def test_sparse_gradients_are_refused_as_torch_does():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = fastfreeze.AdamW(embedding.parameters())
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state


def without(name):
    return lambda state: state["state"][0].pop(name)


def with_step(value):
    return lambda state: state["state"][0].update(step=value)


def of_sgd(state):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, range(1))
    state.clear()
    state.update(sgd.state_dict())


BAD_STATES = {
    "of SGD": (of_sgd, "state_dict must be AdamW's: parameter group 0 has no"),
    "no count": (without("step"), "step of parameter 0"),
    "a negative count": (with_step(-1), "step of parameter 0 must be >= 0, got -1"),
    "a count that is none": (with_step("3"), "step of parameter 0 must be a number, got '3'"),
    "a large count": (with_step(torch.ones(2)), "step of parameter 0 must have one element"),
    "half of the moments": (
        without("exp_avg_sq"),
        r"the state of parameter 0 must have exp_avg and exp_avg_sq, got none for \['exp_avg_sq'\]",
    ),
    "another shape": (
        lambda state: state["state"][0].update(exp_avg=torch.ones(3)),
        r"a exp_avg of parameter group 0 must have its parameter's shape \(6, 6\), got \(3,\)",
    ),
}


@pytest.mark.parametrize(("change", "match"), BAD_STATES.values(), ids=BAD_STATES)
def test_states_that_are_refused(change, match):
    model = net()
    optimizer = fastfreeze.AdamW(model.parameters())
    train(model, optimizer, range(2))
    before = str(optimizer.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises((TypeError, ValueError), match=match):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


EDITS = {
    "a single beta": ({"betas": 0.9}, "parameter group 0 has bad values in .*'betas': 0.9"),
    "eps": ({"eps": None}, "parameter group 0 has bad values in .*'eps': None"),
    "lr": ({"lr": None}, "lr of parameter group 0 must be a number, got None"),
}


@pytest.mark.parametrize(("change", "match"), EDITS.values(), ids=EDITS)
def test_edits_that_are_refused(change, match):
    model = net()
    optimizer = fastfreeze.AdamW(model.parameters())
    train(model, optimizer, range(1))
    optimizer.param_groups[0].update(change)
    before = str(list(model.parameters()))
    with pytest.raises((TypeError, ValueError), match=match):
        train(model, optimizer, range(1))
    assert str(list(model.parameters())) == before


@pytest.mark.parametrize("make", [fastfreeze.SGD, fastfreeze.AdamW])
def test_a_flag_of_none_is_false(make):
    models = [net(), net()]
    for model, flag in zip(models, (None, False), strict=True):
        train(model, make(model.parameters(), lr=0.01, maximize=flag), range(2))
    assert_same_weights(*models)


DTYPES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("before", "after"), DTYPES, ids=str)
def test_moments_keep_their_dtype_when_the_model_changes_its_own(before, after):
    """In torch's for-loop that is an error, with half of the step done."""
    model, truth = net().to(before), net().double()
    for each, dtypes in ((model, (before, after)), (truth, (torch.float64,) * 2)):
        optimizer = fastfreeze.AdamW(each.parameters(), lr=0.01)
        for step, dtype in enumerate(dtypes):
            each.to(dtype)
            for p in each.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtypes[0]}
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert p.dtype == after
        torch.testing.assert_close(p.double(), q, rtol=0.02, atol=0.01)


BAD_ARGUMENTS = {
    "a single beta": ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
    "a beta of 1": ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be >= 0 and < 1, got 1"),
    "a word": ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\] must be a number, got 'a'"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    "a dtype": ({"state_dtype": torch.float16}, ValueError, "state_dtype must be None or"),
    "differentiable": ({"differentiable": True}, ValueError, "use torch.optim.AdamW for it"),
}


@pytest.mark.parametrize(("given", "error", "match"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        fastfreeze.AdamW(net().parameters(), **given)


def test_beta_schedulers_are_followed():
    found = []
    for make in (fastfreeze.AdamW, torch.optim.AdamW):
        model = net()
        optimizer = make(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        for step in range(6):
            train(model, optimizer, [step])
            scheduler.step()
        found.append(model)
    assert_same_weights(*found)
