"""Adam's plans against torch's for-loop in float64, over dtypes, layouts, counts and schedules."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastfreeze.kernels.adam import ADAM_HYPERS, PLANS
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import KERNEL_DTYPES, dtype_of_state
from fastfreeze.kernels.reference import adam_reference
from fastfreeze.schedule import Segment, SegmentTable
from tests.conftest import needs_cpu_kernels, resolved, sgd_kernels
from tests.covering import covering
from tests.kernels.adam_plans import MOMENTS, named, spec_of
from tests.kernels.conftest import STEPPERS, by_steppers
from tests.kernels.guard import SIDES, by_threads, guarded

LR = 0.05
CASES = {
    "adamw": {"weight_decay": 0.1},
    "adam": {"decoupled": False},
    "adam_decays": {"decoupled": False, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1, "decoupled": False},
    "small_betas": {"beta1": 0.3, "beta2": 0.5, "amsgrad": True},
    "no_betas": {"beta1": 0.0, "beta2": 0.0},
    "large_eps": {"eps": 0.5},
    "scaled": {"grad_scale": 8.0, "maximize": True},
}
SIZES = [1, 7, 33, 511, 513, 2049, 8193, 20001]
# Relative to values of order one, after four steps: rounding once per step.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


@pytest.fixture(params=sgd_kernels())
def backend_and_device(request):
    return resolved(request)


def hyper_rows(*cases):
    base = {"lr": LR, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    base |= {"decoupled": True, "maximize": False, "amsgrad": False, "initial_lr": LR}
    return np.array([[float((base | case)[name]) for name in ADAM_HYPERS] for case in cases])


def plan_of(backend, params, *, steps=None, **options):
    """A plan whose moments' memory holds NaN where the kernel is to take them as 0."""
    spec = spec_of(params, steps=steps, **options)
    if backend == "reference":
        spec.moments = {name: [None] * len(params) for name in spec.moments}
    return PLANS[backend](spec)


def take_step(plan, grads, hypers, step=0, grad_scale=None, found_inf=None):
    given = Given(grads)
    aligned = plan.align(given.of(plan.params), given.of(grads), given)
    if grad_scale is not None and plan.on_device:
        grad_scale = torch.full((), grad_scale, device=plan.params[0].device)
    return plan.step(aligned, hypers, step, grad_scale, found_inf)


def make(sizes, dtype, device="cpu", count=4):
    """Parameters and gradients; of some a first gradient comes late, of some one is missing."""

    def gradient(n):
        return ((torch.rand(n) + 0.5) * torch.randn(n).sign()).to(device, dtype)

    params = [torch.rand(n).add(0.5).to(device, dtype) for n in sizes]
    steps = [[gradient(n) for n in sizes] for _ in range(count)]
    for s, grads in enumerate(steps):
        for i in range(len(sizes)):
            if (i % 3 == 1 and s < 2) or (i % 3 == 2 and s == 2):
                grads[i] = None
    return params, steps


def torchs(params, *cases):
    """torch's for-loop over float64 copies, each a group with the values of its case."""
    groups = []
    for p, case in zip(params, cases or [{}], strict=False):
        values = dict(zip(ADAM_HYPERS, hyper_rows(case)[0].tolist(), strict=True))
        groups.append(
            {
                "params": [torch.nn.Parameter(p.cpu().double().clone())],
                "lr": values["lr"],
                "betas": (values["beta1"], values["beta2"]),
                **{name: values[name] for name in ("eps", "weight_decay")},
                **{name: bool(values[name]) for name in ("amsgrad", "maximize")},
                "decoupled_weight_decay": bool(values["decoupled"]),
            }
        )
    return torch.optim.Adam(groups, foreach=False)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def torch_step(optimizer, grads, grad_scale=1.0):
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = None if g is None else g.cpu().double() / grad_scale
    optimizer.step()


def assert_near(ours, truth, dtype):
    truth = truth.detach()
    error = (ours.cpu().double() - truth).abs() / truth.abs().clamp(min=1)
    assert not error.isnan().any()
    assert error.max() <= TOLERANCE[dtype]


def assert_plan_near(plan, steps, truth, amsgrad):
    for i, expected in enumerate(params_of(truth)):
        dtype = plan.params[i].dtype
        assert_near(plan.params[i], expected, dtype)
        state = truth.state[expected]
        assert steps[i] == state["step"]
        for name in MOMENTS[: 3 if amsgrad else 2]:
            assert_near(plan.moments[name][i], state[name], dtype)


@by_steppers(
    dtype=KERNEL_DTYPES,
    case=CASES,
    wide={"": None, "wide": torch.float32},
    offset={"": 0, "unaligned": 1},
)
def test_plans_against_torchs_for_loop_in_fp64(stepper, dtype, case, wide, offset):
    backend, device = stepper
    params, gradients = make([n + offset for n in SIZES], dtype, device)
    params = [p[offset:] for p in params]
    gradients = [[None if g is None else g[offset:] for g in grads] for grads in gradients]
    scale, amsgrad = case.get("grad_scale"), "amsgrad" in case
    truth = torchs(params, *([case] * len(params)))
    steps = torch.zeros(len(params), device=device)
    plan = plan_of(backend, params, amsgrad=amsgrad, state_dtype=wide, steps=steps)
    for step, grads in enumerate(gradients):
        torch_step(truth, grads, scale or 1.0)
        take_step(plan, grads, hyper_rows(case), step, scale)
        for g, p in zip(grads, params_of(truth), strict=True):
            if g is not None:
                assert_near(g, p.grad, dtype)  # left unscaled
    assert_plan_near(plan, steps, truth, amsgrad)
    for name in MOMENTS[: 3 if amsgrad else 2]:
        for p, kept in zip(params, plan.moments[name], strict=True):
            assert kept.dtype == dtype_of_state(p, wide)
    assert plan.unstarted() == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_reference_is_torchs_for_loop_bit_for_bit(dtype):
    for case in CASES.values():
        params = [torch.randn(37, dtype=dtype) for _ in range(2)]
        truth = torchs([p.real for p in params], case, case)
        theirs = [torch.nn.Parameter(p.clone()) for p in params]
        for group, p in zip(truth.param_groups, theirs, strict=True):
            group["params"] = [p]
        values = dict(zip(ADAM_HYPERS, hyper_rows(case)[0].tolist(), strict=True))
        del values["initial_lr"]
        flags = {name: bool(values.pop(name)) for name in ("decoupled", "maximize", "amsgrad")}
        moments = [[None] * 2 for _ in MOMENTS]
        counts = torch.zeros(2)
        for _ in range(3):
            grads = [torch.randn_like(p) for p in params]
            adam_reference(params, grads, *moments, counts.unbind(), **values, **flags)
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g.clone()
            truth.step()
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype.is_complex else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(params, [p.detach() for p in theirs], **near)
        squares = [truth.state[p]["exp_avg_sq"] for p in theirs]
        torch.testing.assert_close(moments[1], squares, **near)


@covering(
    "backend_and_device",
    backend_and_device=sgd_kernels(),
    dtype=KERNEL_DTYPES,
    grad_layout=["channels_last", "contiguous", "sliced"],
)
def test_every_layout_gives_the_same_result(backend, device, dtype, grad_layout):
    values = torch.rand(3, 4, 5, 6).to(device, dtype)
    param = values.to(memory_format=torch.channels_last)
    ours, theirs = plan_of(backend, [param]), plan_of(backend, [values.clone()])
    hypers = hyper_rows({"weight_decay": 0.1})
    for _ in range(2):
        grad = torch.randn(3, 4, 5, 6).to(device, dtype)
        laid_out = {
            "channels_last": grad.to(memory_format=torch.channels_last),
            "contiguous": grad.clone(),
            "sliced": torch.stack([grad, grad], -1)[..., 0],
        }[grad_layout]
        take_step(ours, [laid_out], hypers)
        take_step(theirs, [grad], hypers)
    assert torch.equal(param, theirs.params[0])
    assert ours.moments["exp_avg"][0].stride() == param.stride()
    assert torch.equal(ours.moments["exp_avg"][0], theirs.moments["exp_avg"][0])


@needs_cpu_kernels
def test_threads_give_the_same_bits():
    def stepped(params, gradients):
        plan = plan_of("cpu", [p.clone() for p in params], amsgrad=True)
        for grads in gradients:
            take_step(plan, grads, hyper_rows({"amsgrad": True}))
        return plan.params + plan.moments["max_exp_avg_sq"]

    for dtype in KERNEL_DTYPES:
        data = make([100_000, 3, 70_000], dtype)
        one, three = by_threads(lambda d=data: stepped(*d), (1, 3))
        assert all(map(torch.equal, one, three))


def test_groups_in_one_launch_whose_parameters_count_for_themselves(backend, device):
    """Each group with values of its own, one with amsgrad; counts also from what a user writes."""
    cases = [
        {"weight_decay": 0.1},
        {"lr": 0.02, "beta1": 0.5, "beta2": 0.6, "amsgrad": True, "decoupled": False},
        {"lr": 0.03, "eps": 0.1, "maximize": True, "beta1": 0.0, "beta2": 0.99999},
    ]
    groups = [0, 1, 2, 1]
    params, _ = make([33, 2048, 2049, 1], torch.float32, device)
    steps = torch.zeros(4, device=device)
    spec = spec_of(params, steps=steps, amsgrad=True, groups=groups, segments=[()] * 3)
    largest = spec.moments["max_exp_avg_sq"]
    largest[0] = largest[2] = None
    if backend == "reference":
        spec.moments = {name: [None] * 4 for name in MOMENTS}
    plan = PLANS[backend](spec)
    truth = torchs(params, *(cases[g] for g in groups))
    for step in range(5):
        grads = make([p.numel() for p in params], torch.float32, device, 1)[1][0]
        grads[1] = None if step == 1 else torch.rand_like(params[1]) + 0.5
        if step == 3:
            steps[1] = 40
            truth.state[params_of(truth)[1]]["step"].fill_(40)
        if step == 4:
            steps[2] = truth.state[params_of(truth)[2]]["step"][...] = 100_000
        torch_step(truth, grads)
        lrs = take_step(plan, grads, hyper_rows(*cases), step)
        assert lrs == pytest.approx([LR, 0.02, 0.03])
    for ours, theirs in zip(params, params_of(truth), strict=True):
        assert_near(ours, theirs, torch.float32)
    assert steps.tolist() == [truth.state[p]["step"] for p in params_of(truth)]


def test_more_tensors_than_a_launch_has_arguments_or_looks_at_together(backend, device):
    sizes = [1 + i % 7 for i in range(max(128, getattr(PLANS[backend], "table_from", 0)) + 1)]
    params = [torch.rand(n, device=device) for n in sizes]
    grads = [torch.rand_like(p) + 0.5 for p in params]
    truth, steps = torchs(params, *([{}] * len(params))), torch.zeros(len(params), device=device)
    plan = plan_of(backend, params, steps=steps)
    torch_step(truth, grads)
    take_step(plan, grads, hyper_rows({}))
    assert_plan_near(plan, steps, truth, amsgrad=False)


def test_unstarted_parameters_are_told(backend, device):
    params = [torch.ones(2, device=device), torch.ones(2049, device=device)]
    plan = plan_of(backend, params)
    grads = [torch.ones_like(p) for p in params]
    assert plan.unstarted() == {0, 1}
    if plan.on_device:
        take_step(plan, grads, hyper_rows({}), found_inf=torch.ones((), device=device))
        assert plan.unstarted() == {0, 1}
        assert not any(t.any() for t in (*plan.moments["exp_avg"], *plan.moments["exp_avg_sq"]))
    step, before = int(plan.on_device), [p._version for p in params]
    take_step(plan, [None, grads[1]], hyper_rows({}), step)
    assert plan.unstarted() == {0}
    assert [p._version > b for p, b in zip(params, before, strict=True)] == [False, True]
    take_step(plan, grads, hyper_rows({}), step + 1)
    assert plan.unstarted() == set()


def test_the_reference_takes_given_moments_at_step_0():
    plan = plan_of("reference", [torch.zeros(1)])
    plan.moments |= {"exp_avg": [torch.full((1,), 2.0)], "exp_avg_sq": [torch.zeros(1)]}
    take_step(plan, [torch.ones(1)], hyper_rows({}))
    torch.testing.assert_close(plan.moments["exp_avg"][0], torch.tensor([1.9]))


SEGMENTS = [
    (Segment(0, 8, 1.0), Segment(3, 0, 1.0)),  # frozen from step 3 on
    (Segment(0, 8, 0.5),),
]


def test_a_schedule_sets_rates_and_freezes(backend, device):
    params = [torch.ones(n, device=device) for n in (40, 50, 60)]
    steps, groups = torch.zeros(3, device=device), [0, 1, 1]
    plan = plan_of(
        backend, params, steps=steps, groups=groups, segments=SEGMENTS, eta_min=1e-3, warmup_steps=3
    )
    cases = [{"weight_decay": 0.1, "initial_lr": 0.2}, {"beta1": 0.5, "initial_lr": 0.1}]
    hypers = hyper_rows(*cases)
    rates = SegmentTable(SEGMENTS, 1e-3, 3)
    truth = torchs(params, *(cases[g] for g in groups))
    for step in range(5):
        grads = [torch.randn_like(p) for p in params]
        lrs = rates.lrs(step, hypers[:, -1])
        for group, g in zip(truth.param_groups, groups, strict=True):
            group["lr"] = lrs[g]
        torch_step(truth, [own if lrs[g] else None for own, g in zip(grads, groups, strict=True)])
        found = take_step(plan, grads, hypers, step)
        np.testing.assert_allclose(found, rates.lrs(step + 1, hypers[:, -1]), rtol=1e-15)
    for ours, theirs in zip(params, params_of(truth), strict=True):
        assert_near(ours, theirs, torch.float32)
    assert steps.tolist() == [0 if plan.on_device else 3, 5, 5]  # there a thaw starts anew


@covering("backend_and_device", backend_and_device=sgd_kernels(), dtype=KERNEL_DTYPES)
def test_special_values_spread_as_in_torch(backend, device, dtype):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 1e-4] * 9)
    for case in (CASES["amsgrad"], CASES["adam"], CASES["no_betas"]):
        param, grad = special.to(device, dtype), special.flip(0).roll(1).to(device, dtype)
        truth = torchs([param], case)
        plan = plan_of(backend, [param], amsgrad="amsgrad" in case, state_dtype=torch.float32)
        for step in range(2):
            torch_step(truth, [grad])
            take_step(plan, [grad.clone()], hyper_rows(case), step)
        expected, found = params_of(truth)[0].detach(), param.cpu()
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        torch.testing.assert_close(found[~nan], expected[~nan].to(dtype))
        if "amsgrad" in case:
            largest = next(iter(truth.state.values()))["max_exp_avg_sq"]
            assert torch.equal(plan.moments["max_exp_avg_sq"][0].cpu().isnan(), largest.isnan())


@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@by_steppers(
    [p for p in STEPPERS if p.values[0][0] != "reference" and p.values[0][1] != "cuda"],
    dtype=KERNEL_DTYPES,
    size=[1, 33, 2048, 2051],
    side=SIDES,
)
def test_nothing_beside_the_tensors_is_read_or_written(stepper, dtype, size, side):
    """A stray access ends the process."""
    param, grad, *moments = (guarded(torch.rand(size).to(dtype), side) for _ in range(5))
    steps = torch.ones(1)
    spec = replace(spec_of([param], steps=steps), moments=named(*([m] for m in moments)))
    plan = PLANS[stepper[0]](spec)
    for step, count in enumerate((1.0, 0.0)):
        steps.fill_(count)
        take_step(plan, [grad], hyper_rows({"amsgrad": True}), step, grad_scale=2.0)
    assert not param.isnan().any()


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"amsgrad": True}, "parameter 1 has a gradient and no moments"),
        ({"steps": torch.zeros(3)}, "progress must have a row for each tensor"),
        ({"steps": torch.zeros(2).double()}, "progress has the wrong dtype"),
        ({"steps": torch.zeros(4)[::2]}, "progress must be contiguous"),
        ({"groups": [0, 7]}, "a tensor names group 7"),
        ({"state_dtype": torch.float64}, "a float16 parameter has a state of float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_what_does_not_fit(case, message):
    params = [torch.ones(2).half(), torch.ones(3).half()]
    hypers = hyper_rows({"amsgrad": "amsgrad" in case})
    spec = {k: v for k, v in case.items() if k != "amsgrad"}

    def plan_and_step():
        take_step(plan_of("cpu", params, **spec), [None, torch.ones(3).half()], hypers)

    with pytest.raises(RuntimeError, match=message):
        plan_and_step()
    assert all((p == 1).all() for p in params)


@needs_cpu_kernels
def test_an_unknown_plan_is_refused():
    with pytest.raises(RuntimeError, match="no Adam plan has the handle 123456789"):
        torch.ops.fastfreeze.adam_step(123456789, 0, 0, 0, 1.0, False, 0)


def test_a_sparse_gradient_is_refused(backend, device):
    plan = plan_of(backend, [torch.ones(2, device=device)])
    with pytest.raises(ValueError, match="gradient"):
        take_step(plan, [torch.ones(2, device=device).to_sparse()], hyper_rows({}))
