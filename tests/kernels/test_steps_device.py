"""What the device backends' steps do alone: captured ones, overflows seen by the device alone.

Without a GPU a captured step's launches are recorded, and a replay launches them again.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fastfreeze.optim import SGD, AdamW, FusedOptimizer
from fastfreeze.schedule import Cosine, FreezeOut, FreezeOutCycles, SnapshotCycles
from tests.conftest import HAS_GPU, device_kernels, needs_gpu, resolved
from tests.covering import covering
from tests.kernels.steps import CASES, Beside

TOTAL = 20


@pytest.fixture(params=device_kernels())
def backend_and_device(request):
    return resolved(request)


def parameters(device, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [(33,), (5, 7), (2049,), (1,), (31,), (8,)]
    return [nn.Parameter(torch.randn(s).to(device, dtype)) for s in sizes]


def set_grads(params, step, scale=1.0):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(p.shape, generator=generator).mul(scale).to(p.device, p.dtype)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


class RecordedGraph:
    """A CUDA graph's interface over plans on the CPU."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.launches = monkeypatch, []

    def capture(self, optimizer):
        with self.monkeypatch.context() as patch:
            patch.setattr(FusedOptimizer, "_is_capturing", lambda _: True)
            for part in optimizer._runtime.parts:
                plan = part.plan
                patch.setattr(
                    plan, "_launch", lambda *args, plan=plan: self.launches.append((plan, args))
                )
            optimizer.step()
        assert self.launches

    def replay(self):
        for plan, args in self.launches:
            plan._launch(*args)


class RealGraph:
    def __init__(self, _):
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, optimizer):
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def replay(self):
        self.graph.replay()


@pytest.fixture
def graph(monkeypatch):
    return (RealGraph if HAS_GPU else RecordedGraph)(monkeypatch)


SCHEDULES = {
    "cosine": Cosine(TOTAL),
    "cycles": SnapshotCycles(TOTAL, num_cycles=4),
    "freezeout": FreezeOut(TOTAL, t_0=0.7),
    "sticky": FreezeOutCycles(TOTAL, num_cycles=2, t_0=0.5),
    "thaw": FreezeOutCycles(TOTAL, num_cycles=2, t_0=0.7, composition="thaw"),
    "warm": FreezeOut(TOTAL, t_0=0.7, warmup_steps=7, layer_decay=0.5),
}
sgd = partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1e-2)
CLASSES = {"SGD": sgd, "AdamW": partial(AdamW, lr=0.01, amsgrad=True)}


def make(params, schedule, backend, of=sgd):
    """In three layers."""
    pairs = [params[:2], params[2:4], params[4:]]
    groups = [{"params": ps, "layer_index": i, "num_layers": 3} for i, ps in enumerate(pairs)]
    return of(groups, schedule=schedule, backend=backend)


@covering(
    "backend_and_device",
    backend_and_device=device_kernels(),
    schedule=SCHEDULES,
    of=CLASSES,
    overflows={"no scaler": None, "never": (), "at first": (0, 1), "later": (4,)},
    until={"": TOTAL, "then eager": 10},
)
def test_replays_follow_the_schedule(backend, device, graph, schedule, of, overflows, until):
    """And overflows: also at a state's first step, in a graph or before: the next one is first."""
    params = {name: parameters(device) for name in ("reference", backend)}
    optimizers = {name: make(params[name], schedule, name, of) for name in params}
    for step in range(TOTAL):
        for name, optimizer in optimizers.items():
            set_grads(params[name], step, 1.0 if overflows is None else 4.0)  # of frozen ones too
            if overflows is not None and step == 0:
                optimizer.found_inf = torch.zeros((), device=device)
                optimizer.grad_scale = torch.full((), 4.0, device=device)
            if overflows is not None:
                optimizer.found_inf.fill_(float(step in overflows))
            if name == backend and step == 1:
                graph.capture(optimizer)
                assert optimizer.current_step == 1  # recorded, not taken
            if name == backend and 1 <= step < until:
                graph.replay()
            else:
                optimizer.step()
        near = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(params[backend], params["reference"], **near)
    ours, reference = optimizers[backend], optimizers["reference"]
    assert ours.current_step == TOTAL
    assert ours.frozen_layers == reference.frozen_layers
    lrs = [group["lr"] for group in reference.param_groups]
    assert [group["lr"] for group in ours.param_groups] == pytest.approx(lrs, rel=1e-14, abs=1e-15)
    state, expected = (optimizer.state_dict()["state"] for optimizer in (ours, reference))
    torch.testing.assert_close(state, expected, check_device=False, **near)


def test_a_layer_that_thaws_behind_a_graphs_back_is_an_error(backend, device, graph):
    params = parameters(device)
    optimizer = make(params, SCHEDULES["thaw"], backend)
    while not optimizer.frozen_layers:
        set_grads(params, 0)
        optimizer.step()
    set_grads(params, 0)
    optimizer.step()
    graph.capture(optimizer)  # without the frozen layer
    while optimizer.current_step < TOTAL // 2 - 1:
        graph.replay()
    graph.replay()
    graph.replay()  # the step after the thaw
    with pytest.raises(RuntimeError, match=r"layers \[0\].* have thawed at step 10"):
        _ = optimizer.current_step


# What has been trained before, and whether replays must look who has started.
CAPTURES = {
    "cosine": ("cosine", 1, False, False),
    "layers freeze for good": ("freezeout", 1, False, False),
    "layers will thaw": ("thaw", 1, False, True),
    "all thaws are over": ("thaw", TOTAL // 2 + 1, False, False),
    "no step of a scaler's has been seen": ("cosine", 1, True, True),
    "a scaler comes late": ("cosine", 2, True, False),
}


@pytest.mark.skipif(HAS_GPU, reason="looks at what is launched")
@pytest.mark.parametrize(("schedule", "steps", "scaler", "tracks"), CAPTURES.values(), ids=CAPTURES)
def test_a_graph_looks_who_has_started_where_that_may_change(
    backend, device, graph, schedule, steps, scaler, tracks
):
    params = parameters(device)
    optimizer = make(params, SCHEDULES[schedule], backend)
    for step in range(steps):
        set_grads(params, step)
        if scaler and step == steps - 1:
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        optimizer.step()
    set_grads(params, steps)
    graph.capture(optimizer)
    assert [args[-1] for _, args in graph.launches] == [tracks]
    unstarted = [part.plan.unstarted() for part in optimizer._runtime.parts]
    assert unstarted == [set()]


def test_what_needs_a_step_before_a_capture(backend, device, graph, monkeypatch):
    for change in ("hyperparameter", "gradient", "storage", "no step"):
        params = parameters(device)
        optimizer = SGD(params, lr=0.1, momentum=0.9, backend=backend)
        set_grads(params, 0)
        params[0].grad = None
        if change != "no step":
            optimizer.step()
        if change == "gradient":
            set_grads(params, 0)
        elif change == "hyperparameter":
            optimizer.param_groups[0]["weight_decay"] = 0.1
        elif change == "storage":
            params[1].data = params[1].data.clone()
        before = [p.detach().clone() for p in params]
        with monkeypatch.context() as patch:
            patch.setattr(SGD, "_is_capturing", lambda _: True)
            with pytest.raises(RuntimeError, match="take a step before capturing one"):
                optimizer.step()
        assert all(map(torch.equal, before, params)), change


@pytest.mark.skipif(HAS_GPU, reason="a stub of a stream")
def test_tables_are_kept_for_each_stream_that_steps(backend, device, monkeypatch):
    plan = Beside(backend, [torch.rand(7, device=device)], CASES["momentum"]).plan
    side, kept = object(), []
    plan.runs = plan.progress = type("Table", (), {"record_stream": kept.append})
    for stream in (None, side, side, None):
        plan._keep_for(stream)
    assert kept == [side, side]
    monkeypatch.setattr("fastfreeze.kernels.device_plan.is_capturing", lambda _: True)
    plan._keep_for(object())
    assert kept == [side, side]


@needs_gpu
@pytest.mark.parametrize("of", CLASSES.values(), ids=CLASSES)
def test_a_step_is_one_launch_and_does_not_wait_for_the_device(backend, device, of):
    """Nor do the first one and a freeze, which make tables, nor overflows."""
    params = parameters(device)
    optimizer = make(params, SCHEDULES["freezeout"], backend, of)
    zero, one = (torch.full((), x, device=device) for x in (0.0, 1.0))
    for step in range(TOTAL - 1):
        set_grads(params, step)
        if step == 2:
            optimizer.found_inf, optimizer.grad_scale = zero, one
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len([name for name in kernels if not name.startswith("Mem")]) == 1, kernels
