"""Stages compiled ahead, against the same network uncompiled."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fastfreeze import (
    SGD,
    FastfreezeWarning,
    FeatureCache,
    FreezeOut,
    FreezeOutCycles,
    compile_stages,
    split,
    trim,
)
from fastfreeze.trimming import compile as compiled
from tests.conftest import every_device


class Block(nn.Module):
    """A dense block: behind a cut its norm, and the one after it, are recomputed."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 3, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return torch.cat([x, self.dropout(self.conv(F.relu(self.norm(x), inplace=True)))], 1)


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.blocks = nn.Sequential(Block(4, dropout), Block(7, dropout), Block(10, dropout))
        self.norm = nn.BatchNorm2d(13)
        self.head = nn.Linear(13, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


X, LABELS = torch.randn(5, 2, 7, 6), torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(autouse=True)
def _no_programs(one_thread):
    torch._dynamo.reset()
    counters.clear()


def made(schedule, model=None, device="cpu"):
    """A network, its plan and optimizer, the same each time."""
    torch.manual_seed(3)
    model = (model or Net()).to(device)
    plan = split(model, X.to(device), schedule=schedule, lr=0.1)
    optimizer = SGD(plan.param_groups(), lr=0.1, momentum=0.9, schedule=schedule)
    return trim(model), plan, optimizer


def train(network, optimizer, steps, inputs=X):
    """Losses and, for each step, which of the optimizer's parameters had a gradient."""
    losses, trained = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), LABELS[: len(inputs)].to(inputs.device))
        loss.backward()
        groups = [group["params"] for group in optimizer.param_groups]
        trained.append([[p.grad is not None for p in group] for group in groups])
        optimizer.step()
        losses.append(loss.item())
    return losses, trained


def graphs():
    """How many graphs have been compiled so far."""
    return counters["stats"]["unique_graphs"]


def assert_same_state(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)


def check_training(schedule, programs, backend="aot_eager", device="cpu"):
    """A whole run trains as uncompiled, and compiles nothing."""
    network, plan, optimizer = made(schedule, device=device)
    twin, _, twins_optimizer = made(schedule, device=device)
    x = X.to(device)
    done = compile_stages(network, plan, x, backend=backend)
    assert len(done.stages) == programs == graphs()
    assert [s.frozen for s in done.stages] == sorted((s.frozen for s in done.stages), key=len)
    kept = [stage.saved_bytes for stage in done.stages]
    assert kept == sorted(set(kept), reverse=True)
    assert all(stage.seconds > 0 for stage in done.stages)
    assert done.seconds == pytest.approx(sum(stage.seconds for stage in done.stages))
    losses, trained = train(network, optimizer, schedule.total_steps, x)
    assert graphs() == programs
    twins_losses, twins_trained = train(twin, twins_optimizer, schedule.total_steps, x)
    assert losses == pytest.approx(twins_losses, rel=1e-3)
    assert trained == twins_trained
    assert_same_state(network, twin)
    assert max(losses) > min(losses)
    return done


@every_device
def test_a_run_trains_as_uncompiled_and_compiles_nothing(device):
    done = check_training(FreezeOut(12, t_0=0.5, stages=2), programs=3, device=device)
    assert [stage.steps for stage in done.stages] == [(0,), (3,), (9,)]
    assert str(done).splitlines()[0].split() == [
        *("stage", "from", "step", "frozen", "layers", "kept", "seconds")
    ]


def test_a_thaw_trains_as_uncompiled():
    schedule = FreezeOutCycles(12, num_cycles=2, t_0=0.5, composition="thaw", stages=1)
    done = check_training(schedule, programs=2)
    assert [stage.steps for stage in done.stages] == [(0, 6), (5, 11)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (FreezeOut(12, t_0=0.5, stages=2), [0] * 3 + [1] * 6 + [2] * 3),
        (
            FreezeOutCycles(12, num_cycles=2, t_0=0.5, composition="thaw", stages=1),
            ([0] * 5 + [1]) * 2,
        ),
    ],
)
def test_each_step_runs_its_program(schedule, expected):
    programs, ran = [], []

    def backend(graph, _inputs):
        number = len(programs)
        programs.append(graph)

        def run(*inputs):
            ran.append(number)
            return graph(*inputs)

        return run

    network, plan, optimizer = made(schedule)
    compile_stages(network, plan, X, backend=backend)
    ran.clear()
    train(network, optimizer, 12)
    assert ran == expected


@every_device
@pytest.mark.slow
def test_a_run_trains_as_uncompiled_in_inductor(device):
    schedule = FreezeOut(12, t_0=0.5, stages=2)
    check_training(schedule, programs=3, backend="inductor", device=device)


def test_compiling_leaves_everything_as_it_was():
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=2), Net(dropout=0.5))
    network.blocks[1].requires_grad_(False)
    train(network, optimizer, 3)
    network.blocks[0].conv.eval()
    before = copy.deepcopy(network).state_dict()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    flags = [p.requires_grad for p in network.parameters()]
    modes = [m.training for m in network.modules()]
    torch.manual_seed(5)
    compile_stages(network, plan, X, backend="eager")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    after = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert after.keys() == gradients.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in gradients.items())
    assert [p.requires_grad for p in network.parameters()] == flags
    assert [m.training for m in network.modules()] == modes


def test_frozen_statistics_stay_and_loaded_weights_are_used():
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=2))
    compile_stages(network, plan, X, backend="eager")
    train(network, optimizer, 5)
    compiled_graphs = graphs()
    frozen = network.blocks[0].norm
    assert not frozen.weight.requires_grad
    before = copy.deepcopy(frozen.state_dict())
    network.load_state_dict({n: t * 1.5 for n, t in network.state_dict().items()})
    twin = trim(copy.deepcopy(network.model))
    torch.testing.assert_close(network(X), twin(X))
    assert graphs() == compiled_graphs
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, (before[name] * 1.5).to(value.dtype))


def test_flags_of_no_stage_run_uncompiled_and_never_stale():
    network, plan, _ = made(FreezeOut(12, t_0=0.5, stages=2))
    compile_stages(network, plan, X, backend="eager")
    network.norm.requires_grad_(False)
    with pytest.warns(FastfreezeWarning, match="Net runs uncompiled: compile_stages"):
        network(X).sum().backward()
    assert network.norm.weight.grad is None
    assert network.stem.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X)  # announced once
        network.norm.requires_grad_(True)
        network(X).sum().backward()
    assert network.norm.weight.grad is not None
    assert graphs() == 3


def test_what_does_not_train_is_not_compiled():
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=2))
    compile_stages(network, plan, X, backend="eager")
    train(network, optimizer, 6)
    with torch.no_grad():
        network(X)
    network.eval()
    assert torch.equal(network(X), network.model(X))
    network.train()
    x = X.clone().requires_grad_()
    network(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert graphs() == 3


def test_an_example_of_each_shape():
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=1))
    compile_stages(network, plan, X, X[:3], backend="eager")
    compiled_graphs = graphs()
    for count in (5, 3):
        train(network, optimizer, 6, X[:count])
    assert graphs() == compiled_graphs


def test_models_of_other_shapes_are_compiled_apart():
    given = []

    def backend(graph, inputs):
        given.extend(inputs)
        return graph.forward

    for size in (6, 7, 9):
        x = torch.randn(2, 2, size, size)
        network, plan, _ = made(None)
        compile_stages(network, plan, x, backend=backend)
    assert graphs() == 3
    assert not [value for value in given if isinstance(value, torch.SymInt)]


def test_under_autocast_and_with_a_part_in_eval_mode():
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=1))
    network.norm.eval()
    with torch.autocast("cpu", torch.bfloat16):
        compile_stages(network, plan, X, backend="eager")
        train(network, optimizer, 12)
    assert graphs() == 2
    assert not network.norm.training
    assert not network.norm.num_batches_tracked


@every_device
def test_kept_features(device):
    x = X.to(device)
    network, plan, optimizer = made(FreezeOut(12, t_0=0.5, stages=2), device=device)
    twin, _, twins_optimizer = made(FreezeOut(12, t_0=0.5, stages=2), device=device)
    compile_stages(network, plan, x, backend="eager")
    cache = FeatureCache(network, enabled=True)
    train(network, optimizer, 3, x)
    train(lambda x: cache(x, samples=torch.arange(5)), optimizer, 9, x)
    train(twin, twins_optimizer, 12, x)
    assert_same_state(network, twin)
    assert cache.stats().hits > 0


def test_without_a_schedule_what_trains_now_is_compiled():
    network, _, _ = made(None)
    network.stem.requires_grad_(False)
    done = compile_stages(network, split(network.model, X), X, backend="eager")
    assert [(s.steps, s.frozen) for s in done.stages] == [((0,), frozenset({0}))]
    network(X).sum().backward()
    assert graphs() == 1


def test_a_copy_is_not_compiled():
    network, plan, _ = made(FreezeOut(12, t_0=0.5, stages=1))
    compile_stages(network, plan, X, backend="eager")
    twin = copy.deepcopy(network)
    torch.testing.assert_close(twin(X), network(X))
    twin.norm.requires_grad_(False)
    twin(X)  # without an announcement


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_from_outside_is_refused_in_training(fullgraph):
    network, _, _ = made(FreezeOut(12))
    network.stem.requires_grad_(False)
    network(X)
    options = {"backend": "eager", "fullgraph": fullgraph}
    wholes = [torch.compile(network, **options), torch.compile(lambda x: network(x) + 1, **options)]
    expected = torch._dynamo.exc.Unsupported if fullgraph else TypeError
    network.eval()
    for whole in wholes:
        whole(X)
    network.train()
    for whole in wholes * 2:
        with pytest.raises(expected, match="cannot be compiled from outside"):
            whole(X)
    network(X)
    network.compile(**options)
    with pytest.raises(expected, match="cannot be compiled from outside"):
        network(X)


def test_a_backward_that_has_not_shrunk_is_refused(monkeypatch):
    def stale(model, _options):
        return copy.deepcopy(model).requires_grad_(True)

    monkeypatch.setattr(compiled, "_function", stale)
    network, plan, _ = made(FreezeOut(12, t_0=0.5, stages=2))
    with pytest.raises(RuntimeError, match=r"from step 3 on keeps \d+ bytes, not fewer than the"):
        compile_stages(network, plan, X)
    monkeypatch.undo()
    expected = Net.forward(copy.deepcopy(network.model), X)
    torch.testing.assert_close(network(X), expected)
    assert all(p.requires_grad for p in network.parameters())


def test_many_stages_must_be_asked_for():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    schedule = FreezeOut(100, t_0=0.5)
    plan = split(model, torch.ones(2, 4), schedule=schedule)
    with pytest.raises(ValueError, match=r"at most 8 stages to compile, got 10: give it stages="):
        compile_stages(trim(model), plan, torch.ones(2, 4))
    asked = dataclasses.replace(plan, schedule=FreezeOut(100, t_0=0.5, stages=9))
    done = compile_stages(trim(model), asked, torch.ones(2, 4), backend="eager")
    assert len(done.stages) == 10


class Untraceable(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Unsupported(Net):
    """Its norm's momentum is a number that a graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(13, momentum=None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Untraceable, "network cannot be compiled as one graph: "),
        (Unsupported, "network cannot be compiled as one graph: "),
    ],
)
def test_models_that_cannot_be_compiled(model, message):
    model = model()
    plan = split(model, X)
    with pytest.raises(ValueError, match=message):
        compile_stages(trim(model), plan, X, backend="eager")


def test_bad_arguments():
    network, plan, _ = made(FreezeOut(12, t_0=0.5, stages=2))
    with pytest.raises(TypeError, match="network must be a TrimmedModel, got Net"):
        compile_stages(network.model, plan, X)
    with pytest.raises(TypeError, match="plan must be a LayerPlan, got FreezeOut"):
        compile_stages(network, plan.schedule, X)
    with pytest.raises(ValueError, match="plan must be of the network's model"):
        compile_stages(network, split(Net(), X), X)
    with pytest.raises(ValueError, match="examples must hold at least one input, got none"):
        compile_stages(network, plan)
    with pytest.raises(TypeError, match=r"examples\[1\] must be a tensor, a tuple"):
        compile_stages(network, plan, X, [X])
    with pytest.raises(RuntimeError, match="Invalid backend"):
        compile_stages(network, plan, X, backend="no such")
    network(X)  # without an announcement


def test_measuring_keeps_nothing():
    """ReLU's output is what autograd saves of it: a cycle, if it is saved as it is."""
    network = trim(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert compiled._saved_bytes(network, ((torch.randn(4, 2),), {})) > 0
    weight = weakref.ref(network.model[0].weight)
    del network
    gc.collect()
    assert weight() is None
