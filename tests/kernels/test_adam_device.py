"""Adam's plans on a device: what they compute, count and touch; captured steps and overflows.

Without a GPU a captured step's launches are recorded, and a replay launches them again.
"""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels.adam import PLANS
from fastfreeze.kernels.placements import Given
from fastfreeze.optim import AdamW
from fastfreeze.schedule import Cosine, FreezeOutCycles, Segment
from tests.conftest import HAS_GPU, device_kernels, needs_gpu, resolved
from tests.kernels.adam_plans import assert_near, hypers, spec_of, step, step_truth, truth_of
from tests.kernels.guard import every_side, guarded

TOTAL = 8
SIZES = [33, 2048, 2049, 1]
CASES = {
    "fp32": (torch.float32, {}),
    "fp32, amsgrad": (torch.float32, {"amsgrad": True, "betas": (0.9, 0.5)}),
    "fp32, weight decay not decoupled": (torch.float32, {"decoupled": False, "weight_decay": 0.1}),
    "fp32, maximize and little of beta1": (torch.float32, {"maximize": True, "betas": (0.1, 0.9)}),
    "fp64, amsgrad": (torch.float64, {"amsgrad": True, "eps": 1e-3}),
    "fp16, scaled": (torch.float16, {"betas": (0.9, 0.9), "grad_scale": 8.0}),
    "bf16": (torch.bfloat16, {}),
    "bf16, fp32 state, scaled": (
        torch.bfloat16,
        {"state_dtype": torch.float32, "grad_scale": 8.0, "amsgrad": True},
    ),
}
every_case = pytest.mark.parametrize(("dtype", "options"), CASES.values(), ids=CASES)


@pytest.fixture(params=device_kernels())
def backend_and_device(request):
    return resolved(request)


@pytest.fixture
def plan_class(backend):
    return PLANS[backend]


def gradients(sizes, dtype, device):
    return [(torch.rand(n) + 0.5).mul(torch.randn(n).sign()).to(device, dtype) for n in sizes]


def run_case(plan_class, params, dtype, options, steps=3):
    """So many steps of a case, beside the truth."""
    options = dict(options)
    grad_scale, state_dtype = options.pop("grad_scale", None), options.pop("state_dtype", None)
    spec = spec_of(params, amsgrad=options.get("amsgrad", False), state_dtype=state_dtype)
    plan, truth, table = plan_class(spec), truth_of(spec), hypers(**options)
    scale = None if grad_scale is None else torch.full((), grad_scale, device=params[0].device)
    for at in range(steps):
        grads = gradients([p.numel() for p in params], dtype, params[0].device)
        before = [g.clone() for g in grads]
        step_truth(truth, grads, table, at, grad_scale)
        step(plan, grads, table, at, scale)
        for g, b in zip(grads, before, strict=True):
            assert torch.equal(g, b if grad_scale is None else b / grad_scale)
    assert spec.steps.tolist() == [steps] * len(params)
    assert_near(plan, truth)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@every_case
def test_steps(plan_class, device, dtype, options, offset):
    params = [torch.randn(n + offset).to(device, dtype)[offset:] for n in SIZES]
    run_case(plan_class, params, dtype, options)


@pytest.mark.skipif(HAS_GPU, reason="guards memory of the host")
@every_side
@pytest.mark.parametrize("n", [33, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_beside_a_tensor_is_touched(plan_class, device, dtype, n, side):
    params = [guarded(torch.randn(n).to(dtype), side)]
    spec = spec_of(
        params, amsgrad=True, like=lambda p, dtype: guarded(torch.zeros(n, dtype=dtype), side)
    )
    plan, truth, table = plan_class(spec), truth_of(spec), hypers(amsgrad=True)
    for at in range(2):
        grads = [guarded(g, side) for g in gradients([n], dtype, device)]
        step_truth(truth, grads, table, at)
        step(plan, grads, table, at)
    assert_near(plan, truth)


def test_groups_in_one_launch(plan_class, device):
    """Each with hyperparameters of its own, one of them with amsgrad."""
    params = [torch.randn(n, device=device) for n in SIZES]
    spec = spec_of(params, amsgrad=True, groups=[0, 1, 2, 1], segments=[()] * 3)
    spec.moments["max_exp_avg_sq"][0] = spec.moments["max_exp_avg_sq"][2] = None
    table = hypers(rows=3)
    table[1] = hypers(lr=0.05, betas=(0.5, 0.6), amsgrad=True, decoupled=False)[0]
    table[2] = hypers(lr=0.02, eps=0.1, maximize=True)[0]
    plan, truth = plan_class(spec), truth_of(spec)
    for at in range(3):
        grads = gradients(SIZES, torch.float32, device)
        step_truth(truth, grads, table, at)
        assert step(plan, grads, table, at) == pytest.approx([0.01, 0.05, 0.02])
    assert_near(plan, truth)


def test_each_parameter_counts_its_own_steps(plan_class, device):
    """Also from what a user writes into the counts."""
    params = [torch.randn(n, device=device) for n in SIZES]
    spec = spec_of(params)
    plan, truth, table = plan_class(spec), truth_of(spec), hypers()
    for at in range(4):
        grads = gradients(SIZES, torch.float32, device)
        grads[at] = None
        if at == 3:
            for steps in (spec.steps, truth._steps[1]):
                steps.view(-1)[1 if steps is spec.steps else 0] = 40.0
        step_truth(truth, grads, table, at)
        step(plan, grads, table, at)
    assert spec.steps.tolist() == [3, 41, 3, 3]
    assert_near(plan, truth)


def test_more_tensors_than_a_launch_has_arguments_or_looks_at_together(plan_class, device):
    sizes = [1 + i % 7 for i in range(max(128, plan_class.table_from) + 1)]
    params = [torch.randn(n, device=device) for n in sizes]
    run_case(plan_class, params, torch.float32, {}, steps=1)


def test_long_counts_and_a_beta_of_zero(plan_class, device):
    params = [torch.randn(33, device=device)]
    spec = spec_of(params)
    plan, truth, table = plan_class(spec), truth_of(spec), hypers(betas=(0.0, 0.99999))
    for at in range(2):
        grads = gradients([33], torch.float32, device)
        step_truth(truth, grads, table, at)
        step(plan, grads, table, at)
        spec.steps.fill_(100_000)
        truth._steps[0].fill_(100_000)
    assert_near(plan, truth)


# The first layer trains for 3 steps, is frozen for 2 and starts anew; the second goes on.
THAW = [
    (Segment(0, TOTAL, 1.0), Segment(3, 0.0, 1.0), Segment(5, TOTAL, 1.0)),
    Cosine(TOTAL).segments(),
]


class RecordedGraph:
    """A CUDA graph's interface over a plan on the CPU."""

    def capture(self, plan, *args):
        launch, self.launches = plan._launch, []
        plan._launch = lambda *args: self.launches.append(args)
        plan.capture(*args)
        plan._launch = launch
        self.plan = plan

    def replay(self):
        for args in self.launches:
            self.plan._launch(*args)


class RealGraph:
    def capture(self, plan, *args):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            plan.capture(*args)

    def replay(self):
        self.graph.replay()


@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("overflows", [(), (0,), (2, 6)], ids=str)
def test_a_frozen_layer_starts_anew_and_an_overflow_counts_not(
    plan_class, device, overflows, replayed
):
    params = [torch.randn(n, device=device) for n in (33, 2049)]
    spec = spec_of(params, groups=[0, 1], segments=THAW, warmup_steps=4)
    plan, truth, table = plan_class(spec), truth_of(spec), hypers(rows=2)
    found_inf, grad_scale = torch.zeros((), device=device), torch.full((), 4.0, device=device)
    grads = gradients((33, 2049), torch.float32, device)
    given, graph = Given(grads), (RealGraph if HAS_GPU else RecordedGraph)()
    for at in range(TOTAL):
        for g, fresh in zip(grads, gradients((33, 2049), torch.float32, device), strict=True):
            g.copy_(fresh).mul_(4)
        found_inf.fill_(float(at in overflows))
        if at in (3, 4):  # no moments while it is frozen
            truth._steps[0].zero_()
            truth.moments["exp_avg"][0] = truth.moments["exp_avg_sq"][0] = None
        if at not in overflows:
            step_truth(truth, grads, table, at, 4.0)
        if replayed and at == 1:
            aligned = plan.align(params, grads, given)
            graph.capture(plan, aligned, table, grad_scale, found_inf)
        if replayed and at >= 1:
            graph.replay()
        else:
            step(plan, grads, table, at, grad_scale, found_inf)
    assert spec.steps.tolist() == [3 - len({6} & {*overflows}), TOTAL - len(overflows)]
    assert plan.position() == TOTAL
    assert_near(plan, truth)


def test_who_has_not_started(plan_class, device):
    params = [torch.randn(n, device=device) for n in SIZES]
    plan = plan_class(spec_of(params))
    overflow = torch.ones((), device=device)
    grads = gradients(SIZES, torch.float32, device)
    step(plan, grads, hypers(), 0, None, overflow)
    assert plan.unstarted() == {0, 1, 2, 3}
    assert not any(t.any() for t in (*plan.moments["exp_avg"], *plan.moments["exp_avg_sq"]))
    step(plan, [None, *grads[1:]], hypers(), 1)
    assert plan.unstarted() == {0}
    step(plan, grads, hypers(), 2)
    assert plan.unstarted() == set()


def test_an_optimizer_whose_layers_freeze_and_thaw(backend, device):
    """The same as the reference's, overflows and saved states included."""

    def train(backend):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (33, 2049, 5)]
        groups = [{"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(params)]
        schedule = FreezeOutCycles(12, num_cycles=2, t_0=0.5, composition="thaw")
        optimizer = AdamW(groups, lr=0.01, schedule=schedule, amsgrad=True, backend=backend)
        for at in range(12):
            optimizer.found_inf = torch.full((), float(at in (0, 7)), device=device)
            for p in params:
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        return params, optimizer.state_dict()["state"]

    ours, state = train(backend)
    theirs, expected = train("reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_a_step_on_a_gpu_is_one_launch_that_nobody_waits_for(plan_class, device):
    params = [torch.randn(n, device=device) for n in SIZES]
    grads = gradients(SIZES, torch.float32, device)
    spec, found_inf = spec_of(params), torch.zeros((), device=device)
    scale = torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = plan_class(spec)
        step(plan, grads, hypers(), 0, scale, found_inf)
        step(plan, grads, hypers(), 1)
        assert plan.unstarted() is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(plan, grads, hypers(), 2)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len([name for name in kernels if not name.startswith("Mem")]) == 1, kernels
