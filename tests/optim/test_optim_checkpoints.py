"""States that come from elsewhere: distributed.checkpoint's, other optimizers'."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.optim import SGD, AdamW
from fastfreeze.schedule import Cosine, FreezeOut
from tests.optim.helpers import layer_groups, net, same_bits, train, weights


def with_layers(model, schedule):
    return SGD(layer_groups(model), lr=0.1, momentum=0.9, schedule=schedule)


MAKE = {
    "a schedule": lambda model: with_layers(model, Cosine(10)),
    "frozen layers": lambda model: with_layers(model, FreezeOut(10, t_0=0.3, scale_lr=False)),
    "no schedule": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "wide momentum": lambda model: SGD(
        layer_groups(model),
        lr=0.1,
        momentum=0.9,
        schedule=FreezeOut(10, t_0=0.3, scale_lr=False),
        momentum_dtype=torch.float32,
    ),
    "no momentum": lambda model: SGD(model.parameters(), lr=0.1, total_steps=10),
}


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_distributed_checkpoints_resume(make, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    model = net()
    optimizer = make(model)
    train(model, optimizer, 6)
    saved = copy.deepcopy(
        (model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options))
    )
    train(model, optimizer, 4, start=6)
    resumed = net(1)
    again = make(resumed)
    resumed.load_state_dict(saved[0])
    set_optimizer_state_dict(resumed, again, saved[1], options=options)
    if again.schedule is not None:
        assert again.current_step == 6
    train(resumed, again, 4, start=6)
    assert same_bits(weights(resumed), weights(model))


def test_states_of_other_schedules():
    model = net()
    scheduled = with_layers(model, Cosine(10))
    train(model, scheduled, 10)
    plain, state = SGD(layer_groups(model), lr=0.5), scheduled.state_dict()
    other = with_layers(model, Cosine(20))
    with pytest.raises(ValueError, match="the state was saved under schedule"):
        other.load_state_dict(state)
    assert other.current_step == 0
    with pytest.warns(FastfreezeWarning, match=r"schedule .* and this optimizer has none"):
        plain.load_state_dict(state)
    assert plain.param_groups[0]["lr"] == scheduled.param_groups[0]["lr"]  # as torch's has it
    del state["schedule"]
    plain.load_state_dict(state)
    other.load_state_dict(state)
    assert other.current_step == 10


def test_a_torch_checkpoint_has_no_step_and_perhaps_no_layers():
    model = net()
    layerless = [{"params": m.parameters()} for m in model]
    for groups in (layer_groups(model), layerless):
        rival = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        train(model, rival, 5)
        optimizer = with_layers(model, FreezeOut(20, t_0=0.5))
        with pytest.warns(FastfreezeWarning, match="no step counter"):
            optimizer.load_state_dict(rival.state_dict())
        assert [g["layer_index"] for g in optimizer.param_groups] == [0, 1, 2]
        optimizer.current_step = 5
        assert optimizer.frozen_layers == (0,)
        train(model, optimizer, 15, start=5)
        model.requires_grad_(True)


DTYPES = {
    "to float16": [torch.float16],
    "to bfloat16": [torch.bfloat16],
    "to float64": [torch.float64],
    "to float16 and back": [torch.float16, torch.float32],
    "to float64 and back": [torch.float64, torch.float32],
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_momentum_keeps_its_dtype_when_the_model_changes_its_own(dtypes):
    sides = []
    for make in (SGD, torch.optim.SGD):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(100))
        optimizer = make([p], lr=0.1, momentum=0.9)
        for dtype in (torch.float32, *dtypes, dtypes[-1]):
            p.grad, p.data = None, p.data.to(dtype)
            p.grad = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(dtype)
            optimizer.step()
        sides.append((p.data, optimizer.state[p]["momentum_buffer"]))
    for own, other in zip(*sides, strict=True):
        assert own.dtype == other.dtype
        eps = torch.finfo(dtypes[0]).eps
        torch.testing.assert_close(own, other, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_adams_moments_keep_theirs(dtypes):
    """In torch's for-loop that is an error, with half of the step done."""
    model, truth = net().to(dtypes[0]), net().double()
    for each, own in ((model, dtypes), (truth, (torch.float64,) * 2)):
        optimizer = AdamW(each.parameters(), lr=0.01)
        for step, dtype in enumerate(own):
            each.to(dtype)
            for p in each.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {own[0]}
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert p.dtype == dtypes[1]
        torch.testing.assert_close(p.double(), q, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_torchs_distributed_checkpoints_load(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = net(), net()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, theirs, 3)
    state = get_optimizer_state_dict(model, theirs, options=options)
    ours = SGD(other.parameters(), lr=0.5, momentum=0.1)
    set_optimizer_state_dict(other, ours, state, options=options)
    assert ours.param_groups[0]["momentum"] == 0.9
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(theirs.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])
