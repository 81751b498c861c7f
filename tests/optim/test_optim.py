"""fastfreeze.SGD as a user meets it: torch.optim.SGD's behaviour, its bugs mended, schedules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastfreeze.errors import BackendUnavailableError, FastfreezeWarning
from fastfreeze.kernels import library
from fastfreeze.optim import SGD
from fastfreeze.schedule import (
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Frozen,
    GradualUnfreezing,
    SnapshotCycles,
)
from tests.conftest import needs_cpu_kernels, resolved, sgd_kernels

HYPERS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "dampened": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.1, device="cpu"), "momentum": 0.9},
}
every_hyper = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)


@pytest.fixture(params=sgd_kernels())
def backend_and_device(request):
    return resolved(request)


@pytest.fixture(autouse=True)
def _on_the_backends_device(request):
    """Whatever a test makes is where its backend wants it."""
    device = request.getfixturevalue("device") if "backend" in request.fixturenames else "cpu"
    with torch.device(device):
        yield


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 33), nn.Linear(33, 5))


def layer_groups(model, **extra):
    layers = list(model)
    return [
        {"params": list(m.parameters()), "layer_index": i, "num_layers": len(layers), **extra}
        for i, m in enumerate(layers)
    ]


def train(model, optimizer, steps, *, start=0, scheduler=None):
    for step in range(start, start + steps):
        generator = torch.Generator("cpu").manual_seed(step)
        batch = torch.randn(8, 6, generator=generator, device="cpu").to(model[0].weight.device)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_equal_training(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every_hyper
def test_trains_as_torchs_for_loop(backend, hyper):
    ours, theirs = net(), net()
    train(ours, SGD(ours.parameters(), backend=backend, **hyper), 6)
    train(theirs, torch.optim.SGD(theirs.parameters(), foreach=False, **hyper), 6)
    assert_equal_training(ours, theirs)


def test_positional_arguments_are_torchs():
    ours, theirs = net(), net()
    train(ours, SGD(ours.parameters(), 0.1, 0.9, 0, 1e-3, True), 4)
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.1, 0.9, 0, 1e-3, True), 4)
    assert_equal_training(ours, theirs)


def test_groups_with_their_own_values(backend):
    ours, theirs = net(), net()

    def groups(m):
        return [
            {"params": m[0].parameters(), "lr": 0.5, "momentum": 0.0},
            {"params": m[1].parameters(), "weight_decay": 0.1, "nesterov": True},
            {"params": list(m[2].named_parameters())[0:1][0][1:], "maximize": True},
        ]

    train(ours, SGD(groups(ours), lr=0.1, momentum=0.9, backend=backend), 5)
    train(theirs, torch.optim.SGD(groups(theirs), lr=0.1, momentum=0.9), 5)
    assert_equal_training(ours, theirs)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "one cycle with momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_torchs_schedulers_drive_it(backend, make):
    ours, theirs = net(), net()
    optimizer = SGD(ours.parameters(), lr=0.1, momentum=0.9, backend=backend)
    train(ours, optimizer, 9, scheduler=make(optimizer))
    rival = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(rival)
    train(theirs, rival, 9, scheduler=scheduler)
    assert_equal_training(ours, theirs)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_closure_and_hooks():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    before = model(torch.ones(2, 6)).square().mean()
    assert optimizer.step(closure) == before
    assert calls == ["pre", "closure", "post"]
    assert model(torch.ones(2, 6)).square().mean() < before


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


def test_a_compiled_training_step_breaks_its_graph_and_goes_on(backend):
    ours, theirs = net(), net()
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, total_steps=10, backend=backend)
    t = SGD(theirs.parameters(), lr=0.1, momentum=0.9, total_steps=10, backend=backend)
    compiled = torch.compile(lambda step: train(ours, o, 1, start=step), backend="eager")
    for step in range(4):
        compiled(step)
        train(theirs, t, 1, start=step)
    assert o.current_step == 4
    assert_equal_training(ours, theirs)


# Live bugs of torch's fused path.


def test_a_gradient_that_comes_later(backend):
    ours, theirs = net(), net()
    ours[0].requires_grad_(False)
    theirs[0].requires_grad_(False)
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    t = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    train(ours, o, 2)
    train(theirs, t, 2)
    ours[0].requires_grad_(True)
    theirs[0].requires_grad_(True)
    train(ours, o, 3, start=2)
    train(theirs, t, 3, start=2)
    assert_equal_training(ours, theirs)


@pytest.mark.parametrize("overflow_at", [0, 1, 3])
def test_an_overflow_changes_nothing(backend, overflow_at):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, total_steps=10, backend=backend)
    scaler = torch.amp.GradScaler(model[0].weight.device.type, init_scale=4.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).square().mean()).backward()
        if step == overflow_at:
            model[1].weight.grad[0, 0] = torch.inf
            before = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        scaler.step(optimizer)
        if step == overflow_at:
            after = optimizer.state_dict()["state"]
            assert same_bits(weights(model), before[0])
            assert after.keys() == before[1].keys()
            for i in after:
                assert torch.equal(after[i]["momentum_buffer"], before[1][i]["momentum_buffer"])
        scaler.update()
        assert optimizer.current_step == step + 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_grad_scaler_equals_unscaled_training(backend):
    ours, theirs = net(), net()
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, backend=backend)
    t = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, foreach=False)
    scaler = torch.amp.GradScaler(ours[0].weight.device.type, init_scale=1024.0)
    for step in range(4):
        x = torch.randn(4, 6)
        for model, optimizer in ((ours, o), (theirs, t)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if optimizer is o else loss).backward()
        if step == 2:
            scaler.unscale_(o)
        scaler.step(o)
        scaler.update()
        t.step()
    assert_equal_training(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_element_is_updated(backend, dtype):
    parameter = nn.Parameter(torch.ones(1000, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    SGD([parameter], lr=0.5, backend=backend).step()
    assert (parameter == 0.5).all()


def test_channels_last_parameter_with_contiguous_gradient(backend):
    parameter = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    before, grad = parameter.detach().clone(), torch.randn(4, 3, 5, 5)
    parameter.grad = grad
    SGD([parameter], lr=1.0, backend=backend).step()
    torch.testing.assert_close(parameter.detach(), before - grad)


# What changes between steps.


def test_storage_changes_between_steps(backend):
    ours, theirs = net(), net()
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, backend=backend)
    t = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    train(ours, o, 2)
    train(theirs, t, 2)
    for model in (ours, theirs):
        model[1].weight.data = model[1].weight.data.clone()
        model[2].weight.data = model[2].weight.data * 0.5
    train(ours, o, 2, start=2)
    train(theirs, t, 2, start=2)
    assert_equal_training(ours, theirs)


def test_hyperparameters_change_between_steps(backend):
    ours, theirs = net(), net()
    o = SGD(ours.parameters(), lr=0.1, momentum=0.9, backend=backend)
    t = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    values = [
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"momentum": 0.0},
        {"momentum": 0.5},
        {"maximize": True},
    ]
    for step, change in enumerate(values):
        for optimizer in (o, t):
            optimizer.param_groups[0].update(change)
        train(ours, o, 2, start=2 * step)
        train(theirs, t, 2, start=2 * step)
    assert_equal_training(ours, theirs)


def test_a_group_added_later(backend):
    ours, theirs = net(), net()
    o = SGD(ours[1:].parameters(), lr=0.1, momentum=0.9, backend=backend)
    t = torch.optim.SGD(theirs[1:].parameters(), lr=0.1, momentum=0.9)
    train(ours, o, 2)
    train(theirs, t, 2)
    o.add_param_group({"params": ours[0].parameters(), "lr": 0.01})
    t.add_param_group({"params": theirs[0].parameters(), "lr": 0.01})
    for model in (ours, theirs):
        model.zero_grad()
    train(ours, o, 2, start=2)
    train(theirs, t, 2, start=2)
    assert_equal_training(ours, theirs)


@needs_cpu_kernels
def test_what_the_kernel_cannot_take_goes_to_the_reference():
    torch.manual_seed(0)
    tensors = [torch.randn(5), torch.randn(3, dtype=torch.cfloat), torch.randn(4, 6)[:, ::2]]
    ours = [nn.Parameter(t.clone()) for t in tensors[:2]] + [nn.Parameter(tensors[2])]
    theirs = [nn.Parameter(t.detach().clone()) for t in tensors]
    table = nn.Embedding(6, 3, sparse=True)
    ours.append(table.weight)
    twin = copy.deepcopy(table)
    theirs.append(twin.weight)
    o, t = SGD(ours, lr=0.1, momentum=0.9), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(3):
        for p, q in zip(ours[:3], theirs[:3], strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            q.grad = p.grad.clone()
        for module in (table, twin):
            module.zero_grad()
            module(torch.tensor([step, 1])).sum().backward()
        o.step()
        t.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_shared_and_meta_parameters_do_not_mislead(backend):
    weight = nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        SGD([weight, weight], lr=0.1)
    frozen_by_hand = nn.Parameter(torch.ones(4), requires_grad=False)
    frozen_by_hand.grad = torch.ones(4)  # torch steps a stale gradient, and so do we
    SGD([frozen_by_hand], lr=0.5, backend=backend).step()
    assert frozen_by_hand.tolist() == [0.5] * 4


# Schedules.


def test_the_schedule_sets_every_learning_rate(backend):
    model = net()
    schedule = SnapshotCycles(12, num_cycles=3, eta_min=0.01)
    optimizer = SGD(model.parameters(), lr=0.3, schedule=schedule, backend=backend)
    seen = []
    for step in range(12):
        seen.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, 1, start=step)
    assert seen == pytest.approx(schedule.lr(range(12), 0.3).tolist(), rel=1e-14)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr(12, 0.3), abs=1e-15)


SCHEDULES = {
    "cosine": Cosine(20),
    "cycles": SnapshotCycles(20, num_cycles=4),
    "freezeout": FreezeOut(20, t_0=0.5),
    "sticky": FreezeOutCycles(20, num_cycles=4, t_0=0.5),
    "thaw": FreezeOutCycles(20, num_cycles=2, t_0=0.5, composition="thaw"),
    "warm": FreezeOut(20, t_0=0.5, warmup_steps=6),
    "frozen": Frozen(20, until=1),
    "unfreezing": GradualUnfreezing(20, unfreeze_every=6, warmup_steps=9, layer_decay=0.5),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_equals_torch_with_the_rates_set_by_hand(backend, schedule):
    ours, theirs = net(), net()
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    o = SGD(layer_groups(ours), schedule=schedule, backend=backend, **hyper)
    t = torch.optim.SGD(layer_groups(theirs), **hyper)
    for step in range(20):
        for i, group in enumerate(t.param_groups):
            group["lr"] = schedule.lr(step, 0.1, i, 3)
            frozen = schedule.is_frozen(step, i, 3)
            theirs[i].requires_grad_(not frozen)
            if frozen:
                for p in group["params"]:
                    p.grad = None
                    t.state.pop(p, None)
        train(ours, o, 1, start=step)
        train(theirs, t, 1, start=step)
    assert_equal_training(ours, theirs)


def test_frozen_means_frozen(backend):
    model = net()
    schedule = FreezeOut(20, t_0=0.5)
    optimizer = SGD(
        layer_groups(model),
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        schedule=schedule,
        backend=backend,
    )
    frozen_at = [schedule.freeze_steps(i, 3) for i in range(3)]
    assert frozen_at == [(3,), (9,), ()]
    kept = {}
    for step in range(20):
        train(model, optimizer, 1, start=step)
        now = tuple(i for i, at in enumerate(frozen_at) if at and at[0] <= step + 1)
        assert optimizer.frozen_layers == now
        for i in range(3):
            for p in model[i].parameters():
                assert p.requires_grad == (i not in now)
                if i in now:
                    assert p.grad is None or step + 1 > frozen_at[i][0]
                    assert p not in optimizer.state
                    p.grad = torch.ones_like(p)  # even so
                    assert torch.equal(kept.setdefault(p, p.detach().clone()), p)
    assert optimizer.param_groups[0]["lr"] == 0
    assert len(kept) == 4


def test_thawing_restores_only_what_freezing_took():
    model = net()
    model[0].bias.requires_grad_(False)
    schedule = FreezeOutCycles(20, num_cycles=2, t_0=0.5, composition="thaw")
    optimizer = SGD(layer_groups(model), lr=0.1, momentum=0.9, schedule=schedule)
    train(model, optimizer, 9)
    assert optimizer.frozen_layers == (0, 1)
    assert not model[0].weight.requires_grad
    train(model, optimizer, 1, start=9)
    assert optimizer.frozen_layers == ()
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


def test_a_changed_rate_is_refused():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, total_steps=10)
    train(model, optimizer, 1)
    before = weights(model)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr of parameter group 0 must be .* got 0\.5"):
        train(model, optimizer, 1)
    assert same_bits(weights(model), before)


def test_the_initial_rate_may_be_changed():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, total_steps=10)
    optimizer.param_groups[0]["initial_lr"] = 0.2
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(Cosine(10).lr(1, 0.2))


def test_stepping_past_the_end_is_refused():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, total_steps=3)
    train(model, optimizer, 3)
    before = weights(model)
    with pytest.raises(ValueError, match="after the schedule's total_steps=3"):
        train(model, optimizer, 1)
    assert same_bits(weights(model), before)


# Checkpoints.


def test_wide_momentum_survives_a_checkpoint(backend):
    def make(model):
        return SGD(
            model.parameters(),
            lr=0.1,
            momentum=0.9,
            momentum_dtype=torch.float32,
            backend=backend,
        )

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            for i, p in enumerate(model.parameters()):
                torch.manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape).to(p.dtype)
            optimizer.step()

    straight, first, resumed = (net().to(torch.bfloat16) for _ in range(3))
    steps(straight, make(straight), 0, 6)
    optimizer = make(first)
    steps(first, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    assert {s["momentum_buffer"].dtype for s in state["state"].values()} == {torch.float32}
    resumed.load_state_dict(first.state_dict())
    second = make(resumed)
    second.load_state_dict(state)
    steps(resumed, second, 3, 6)
    assert same_bits(weights(resumed), weights(straight))


@every_schedule
def test_resume_is_bit_exact(backend, schedule):
    def make(model):
        return SGD(
            layer_groups(model),
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            schedule=schedule,
            backend=backend,
        )

    straight = net()
    optimizer = make(straight)
    saved = {}
    for step in range(20):
        if step in (0, 4, 10, 13, 19):
            states = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
            saved[step] = *states, optimizer.frozen_layers
        train(straight, optimizer, 1, start=step)
    for step, (state, optimizer_state, frozen) in saved.items():
        resumed = net(seed=1)
        second = make(resumed)
        resumed.load_state_dict(state)
        second.load_state_dict(optimizer_state)
        assert second.current_step == step
        assert second.frozen_layers == frozen
        train(resumed, second, 20 - step, start=step)
        assert same_bits(weights(resumed), weights(straight)), step


@pytest.mark.parametrize("implementation", ["foreach", "fused", "for-loop"])
def test_checkpoints_go_both_ways(backend, implementation):
    flags = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}

    def theirs(model):
        return torch.optim.SGD(model.parameters(), **hyper, **flags)

    def ours(model):
        return SGD(model.parameters(), **hyper, backend=backend)

    straight = net()
    train(straight, theirs(straight), 6)
    for first, second in ((theirs, ours), (ours, theirs)):
        model = net()
        optimizer = first(model)
        train(model, optimizer, 3)
        other = copy.deepcopy(model)
        successor = second(other)
        successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, successor, 3, start=3)
        assert_equal_training(other, straight)


def test_a_torch_checkpoint_has_no_step():
    model = net()
    rival = torch.optim.SGD(layer_groups(model), lr=0.1, momentum=0.9)
    train(model, rival, 5)
    optimizer = SGD(layer_groups(model), lr=0.1, momentum=0.9, schedule=FreezeOut(20, t_0=0.5))
    with pytest.warns(FastfreezeWarning, match="no step counter"):
        optimizer.load_state_dict(rival.state_dict())
    optimizer.current_step = 5
    assert optimizer.frozen_layers == (0,)
    train(model, optimizer, 15, start=5)


def test_a_layerless_torch_checkpoint_keeps_our_layers():
    model = net()
    rival = torch.optim.SGD([{"params": m.parameters()} for m in model], lr=0.1, momentum=0.9)
    train(model, rival, 2)
    optimizer = SGD(layer_groups(model), lr=0.1, momentum=0.9, schedule=FreezeOut(20, t_0=0.5))
    with pytest.warns(FastfreezeWarning):
        optimizer.load_state_dict(rival.state_dict())
    assert [g["layer_index"] for g in optimizer.param_groups] == [0, 1, 2]
    train(model, optimizer, 20)


def test_another_schedules_state_is_refused():
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, total_steps=10)
    train(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    other = SGD(model.parameters(), lr=0.1, total_steps=20)
    with pytest.raises(ValueError, match="the state was saved under schedule"):
        other.load_state_dict(state)
    assert other.current_step == 0
    del state["schedule"]
    other.load_state_dict(state)
    assert other.current_step == 4


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_train_on_alone(backend, clone):
    model = net()
    optimizer = SGD(
        layer_groups(model), lr=0.1, momentum=0.9, schedule=FreezeOut(20, t_0=0.5), backend=backend
    )
    train(model, optimizer, 5)
    other_model, other = clone((model, optimizer))
    train(model, optimizer, 10, start=5)
    assert not same_bits(weights(model), weights(other_model))
    train(other_model, other, 10, start=5)
    assert same_bits(weights(model), weights(other_model))
    assert other.frozen_layers == optimizer.frozen_layers


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0, got nan"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must have one element"),
        ({"momentum": -0.1}, ValueError, "momentum must be >= 0, got -0.1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be >= 0, got -1"),
        ({"nesterov": True}, ValueError, "nesterov=True needs momentum > 0"),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot both be True"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"schedule": 3}, TypeError, "schedule must be a fastfreeze Schedule, got 3"),
        ({"schedule": Cosine(5), "total_steps": 6}, ValueError, "must be the schedule's 5"),
        ({"schedule": FreezeOut(5)}, ValueError, "group 0 has no 'layer_index'"),
        ({"schedule": Cosine(5, eta_min=0.5)}, ValueError, "eta_min must not exceed"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        SGD(net().parameters(), **kwargs)


def test_a_group_that_does_not_fit_is_not_added():
    model = net()
    optimizer = SGD(layer_groups(model)[1:], lr=0.1, schedule=FreezeOut(20, t_0=0.5))
    with pytest.raises(ValueError, match="no 'layer_index'"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.param_groups) == 2


def test_current_step_is_checked():
    optimizer = SGD(net().parameters(), lr=0.1, total_steps=5)
    with pytest.raises(ValueError, match=r"current_step must be in 0\.\.5, got 6"):
        optimizer.current_step = 6


def test_an_unavailable_backend_raises_at_once():
    missing = [n for n, a in library.backends().items() if not a.available]
    if not missing:
        pytest.skip("every backend can run here")
    with pytest.raises(BackendUnavailableError, match="cannot run here"):
        SGD(net().parameters(), backend=missing[0])
