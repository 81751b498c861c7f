"""Optimizers as a user meets them: on every backend beside torch's for-loop, under schedules."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from fastfreeze.optim import SGD, AdamW
from fastfreeze.schedule import (
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Frozen,
    GradualUnfreezing,
    SnapshotCycles,
)
from tests.covering import covering
from tests.optim.helpers import (
    BACKENDS,
    assert_equal_training,
    counts,
    layer_groups,
    net,
    same_bits,
    train,
    weights,
)


def test_groups_with_their_own_values(backend):
    ours, theirs = net(), net()

    def groups(m):
        rate = torch.tensor(0.05, device="cpu")
        return [
            {"params": m[0].parameters(), "lr": 0.5, "momentum": 0.0},
            {"params": m[1].parameters(), "weight_decay": 0.1, "nesterov": True},
            {"params": m[2].weight, "maximize": True, "dampening": 0.5},
            {"params": m[2].bias, "lr": rate},
        ]

    train(ours, SGD(groups(ours), lr=0.1, momentum=0.9, backend=backend), 6)
    train(theirs, torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9, foreach=False), 6)
    assert_equal_training(ours, theirs)


def test_a_subclass_with_a_step_of_its_own_calls_hooks_once():
    class Counting(SGD):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    calls = []
    optimizer = Counting([nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "step", "post"]


def test_a_compiled_training_step_breaks_its_graph_and_goes_on():
    ours, theirs = net(), net()
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, total_steps=10)
    t = SGD(theirs.parameters(), lr=0.1, momentum=0.9, total_steps=10)
    compiled = torch.compile(lambda step: train(ours, o, 1, start=step), backend="eager")
    for step in range(4):
        compiled(step)
        train(theirs, t, 1, start=step)
    assert o.current_step == 4
    assert_equal_training(ours, theirs)


CLASSES = {
    "SGD": (
        partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    ),
    "AdamW": (
        partial(AdamW, lr=0.01, amsgrad=True),
        partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    ),
    "AdamW, wide state": (partial(AdamW, lr=0.01, state_dtype=torch.float32), None),
}

# GradScalers.


@covering(
    "backend_and_device",
    backend_and_device=BACKENDS,
    classes={name: CLASSES[name] for name in ("SGD", "AdamW")},
    overflows={"never": (), "at first": (0,), "later": (1, 3)},
)
def test_a_step_that_overflows_is_none_but_for_the_schedule(backend, device, classes, overflows):
    ours, theirs = net(), net()
    o, t = classes[0](ours.parameters(), backend=backend), classes[1](theirs.parameters())
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(5):
        x = torch.randn(4, 6)
        for model, optimizer in ((ours, o), (theirs, t)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if optimizer is o else loss).backward()
        if step in overflows:
            ours[1].weight.grad[0, 0] = torch.inf
            before = weights(ours), copy.deepcopy(o.state_dict()["state"])
        if step == 2:
            scaler.unscale_(o)
        scaler.step(o)
        if step in overflows:
            assert same_bits(weights(ours), before[0])
            torch.testing.assert_close(o.state_dict()["state"], before[1], rtol=0, atol=0)
        else:
            t.step()
        scaler.update()
        assert o.current_step == step + 1
    assert_equal_training(ours, theirs, rtol=1e-5, atol=1e-6)
    if isinstance(o, AdamW):
        assert counts(o) == [5 - len(overflows)] * 6


def test_what_an_overflow_leaves_of_the_state(backend, device):
    """And gradients unscaled, also those of other strides than their parameters."""
    a, b = (nn.Parameter(torch.randn(1000)) for _ in range(2))
    images = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = SGD([a, b, images], lr=0.1, momentum=0.9, backend=backend)
    optimizer.state[a]["mine"] = 1
    before = a.detach().clone()
    without_gradients = torch.amp.GradScaler(device.type)
    without_gradients.scale(torch.ones(()))
    without_gradients.step(optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    for loss in (((a + b) * float("inf")).sum(), a.sum()):
        optimizer.state_dict()
        assert optimizer.state[a] == {"mine": 1}
        assert torch.equal(a, before)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        images.grad = torch.full((2, 3, 4, 4), scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert (images.grad == 1).all()
    buffer = optimizer.state.get(b, {}).get("momentum_buffer")
    assert buffer is None or not buffer.any()
    torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], torch.ones(1000))


# Schedules.

TOTAL = 20
SCHEDULES = {
    "cosine": Cosine(TOTAL),
    "cycles": SnapshotCycles(TOTAL, num_cycles=4, eta_min=0.001),
    "freezeout": FreezeOut(TOTAL, t_0=0.5),
    "sticky": FreezeOutCycles(TOTAL, num_cycles=4, t_0=0.5),
    "thaw": FreezeOutCycles(TOTAL, num_cycles=2, t_0=0.5, composition="thaw"),
    "warm": FreezeOut(TOTAL, t_0=0.5, warmup_steps=6),
    "frozen": Frozen(TOTAL, until=1),
    "unfreezing": GradualUnfreezing(TOTAL, unfreeze_every=6, warmup_steps=9, layer_decay=0.5),
}


def set_by_hand(model, optimizer, schedule, step):
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = schedule.lr(step, optimizer.defaults["lr"], i, 3)
        frozen = schedule.is_frozen(step, i, 3)
        model[i].requires_grad_(not frozen)
        for p in group["params"] if frozen else ():
            p.grad = None
            optimizer.state.pop(p, None)


def assert_follows(model, optimizer, schedule, step, kept):
    """After so many steps; kept: what layers held when they froze."""
    rates = [schedule.lr(step, optimizer.defaults["lr"], i, 3) for i in range(3)]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates, rel=1e-14, abs=1e-15)
    frozen = tuple(i for i in range(3) if step < TOTAL and schedule.is_frozen(step, i, 3))
    if step < TOTAL:
        assert optimizer.frozen_layers == frozen
    for i, layer in enumerate(model):
        if i not in optimizer.frozen_layers:
            kept.pop(i, None)
            continue
        assert same_bits(kept.setdefault(i, weights(layer)), weights(layer))
        for p in layer.parameters():
            assert not p.requires_grad
            assert p not in optimizer.state
            p.grad = torch.ones_like(p)  # even so


@covering("backend_and_device", backend_and_device=BACKENDS, schedule=SCHEDULES, classes=CLASSES)
def test_a_schedule_is_followed_and_resumed_bit_for_bit(backend, schedule, classes):
    """From each of some steps, by its state, by a copy or by a pickle."""
    make, theirs = classes
    model, truth = net(), net()
    if theirs is None:
        model.to(torch.bfloat16)
    else:
        by_hand = theirs(layer_groups(truth), foreach=False)
    optimizer = make(layer_groups(model), schedule=schedule, backend=backend)
    kept, saved = {}, {}
    for step in range(TOTAL):
        assert_follows(model, optimizer, schedule, step, kept)
        if step in (0, 4, 10, 13, 19):
            saved[step] = [
                copy.deepcopy((model.state_dict(), optimizer.state_dict())),
                optimizer.frozen_layers,
            ]
        if step in (4, 13):
            copied = copy.deepcopy if step == 4 else lambda o: pickle.loads(pickle.dumps(o))
            saved[step].append(copied((model, optimizer)))
        train(model, optimizer, 1, start=step)
        if theirs is not None:
            set_by_hand(truth, by_hand, schedule, step)
            train(truth, by_hand, 1, start=step)
    assert_follows(model, optimizer, schedule, TOTAL, kept)
    if theirs is not None:
        assert_equal_training(model, truth, rtol=1e-5, atol=1e-6)
    for step, ((state, optimizer_state), frozen, *copies) in saved.items():
        other = net(seed=1).to(model[0].weight.dtype)
        resumed = make(layer_groups(other), schedule=schedule, backend=backend)
        other.load_state_dict(state)
        resumed.load_state_dict(optimizer_state)
        for again, resumed_optimizer in ((other, resumed), *copies):
            assert resumed_optimizer.current_step == step
            assert resumed_optimizer.frozen_layers == frozen
            train(again, resumed_optimizer, TOTAL - step, start=step)
            assert same_bits(weights(again), weights(model)), step


def test_thawing_restores_only_what_freezing_took():
    model = net()
    model[0].bias.requires_grad_(False)
    optimizer = SGD(layer_groups(model), lr=0.1, momentum=0.9, schedule=SCHEDULES["thaw"])
    train(model, optimizer, 9)
    assert optimizer.frozen_layers == (0, 1)
    assert not model[0].weight.requires_grad
    train(model, optimizer, 1, start=9)
    assert optimizer.frozen_layers == ()
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
