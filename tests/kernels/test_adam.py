"""Adam's plans against torch's for-loop in float64, over dtypes, layouts, counts and schedules."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastfreeze.kernels.adam import ADAM_HYPERS, AdamCpuPlan, AdamReferencePlan
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import KERNEL_DTYPES, dtype_of_state
from fastfreeze.kernels.reference import adam_reference
from fastfreeze.schedule import Segment, SegmentTable
from tests.conftest import ISAS, needs_cpu_kernels
from tests.covering import covering
from tests.kernels.adam_plans import MOMENTS, named, spec_of
from tests.kernels.guard import SIDES, guarded

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
PLANS = {"cpu": AdamCpuPlan, "reference": AdamReferencePlan}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels, id="cpu"), "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


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


def take_step(plan, grads, hypers, step=0, grad_scale=None):
    given = Given(grads)
    aligned = plan.align(given.of(plan.params), given.of(grads), given)
    lrs = plan.step(aligned, hypers, step, grad_scale, None)
    return aligned, lrs


def make(sizes, dtype, count=4):
    """Parameters and gradients; of some a first gradient comes late, of some one is missing."""

    def gradient(n):
        return ((torch.rand(n) + 0.5) * torch.randn(n).sign()).to(dtype)

    params = [torch.rand(n).add(0.5).to(dtype) for n in sizes]
    steps = [[gradient(n) for n in sizes] for _ in range(count)]
    for s, grads in enumerate(steps):
        for i in range(len(sizes)):
            if (i % 3 == 1 and s < 2) or (i % 3 == 2 and s == 2):
                grads[i] = None
    return params, steps


def torchs(params, case):
    """torch's for-loop over float64 copies."""
    named = dict(zip(ADAM_HYPERS, hyper_rows(case)[0].tolist(), strict=True))
    copies = [torch.nn.Parameter(p.double().clone()) for p in params]
    return (torch.optim.AdamW if named["decoupled"] else torch.optim.Adam)(
        copies,
        lr=LR,
        betas=(named["beta1"], named["beta2"]),
        eps=named["eps"],
        weight_decay=named["weight_decay"],
        amsgrad=bool(named["amsgrad"]),
        maximize=bool(named["maximize"]),
        foreach=False,
    )


def torch_step(optimizer, grads, grad_scale=1.0):
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = None if g is None else g.double() / grad_scale
    optimizer.step()


def assert_near(ours, truth, dtype):
    error = (ours.double() - truth.detach()).abs() / truth.detach().abs().clamp(min=1)
    assert not error.isnan().any()
    assert error.max() <= TOLERANCE[dtype]


def assert_near_torch(backend, dtype, case, state_dtype=None):
    params, gradients = make(SIZES, dtype)
    scale = case.get("grad_scale")
    truth = torchs(params, case)
    steps = torch.zeros(len(params))
    plan = plan_of(backend, params, amsgrad="amsgrad" in case, state_dtype=state_dtype, steps=steps)
    hypers = hyper_rows(case)
    for step, grads in enumerate(gradients):
        torch_step(truth, grads, scale or 1.0)
        take_step(plan, grads, hypers, step, scale)
    for i, expected in enumerate(truth.param_groups[0]["params"]):
        assert_near(params[i], expected, dtype)
        state = truth.state[expected]
        assert steps[i] == state["step"]
        for name in MOMENTS[: 3 if "amsgrad" in case else 2]:
            kept = plan.moments[name][i]
            assert kept.dtype == dtype_of_state(params[i], state_dtype)
            assert_near(kept, state[name], dtype)
    assert plan.unstarted() == set()


@covering("backend", backend=BACKENDS, dtype=KERNEL_DTYPES, case=CASES)
def test_plans_against_torchs_for_loop_in_fp64(backend, dtype, case):
    assert_near_torch(backend, dtype, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "amsgrad", "scaled"])
def test_wide_moments_of_16_bit_parameters(backend, dtype, name):
    assert_near_torch(backend, dtype, CASES[name], torch.float32)


@covering("isa", isa=ISAS, dtype=KERNEL_DTYPES, case=CASES)
def test_every_instruction_set_against_torchs_for_loop_in_fp64(isa, dtype, case):
    assert_near_torch("cpu", dtype, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@every_case
def test_the_reference_is_torchs_for_loop_bit_for_bit(dtype, case):
    case = {k: v for k, v in case.items() if k != "grad_scale"}
    params = [torch.randn(37, dtype=dtype) for _ in range(2)]
    truth = torchs([p.real for p in params], case)
    truth.param_groups[0]["params"] = theirs = [torch.nn.Parameter(p.clone()) for p in params]
    named = dict(zip(ADAM_HYPERS, hyper_rows(case)[0].tolist(), strict=True))
    del named["initial_lr"]
    flags = {name: bool(named.pop(name)) for name in ("decoupled", "maximize", "amsgrad")}
    moments = [[None] * 2 for _ in MOMENTS]
    counts = torch.zeros(2)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        adam_reference(params, grads, *moments, counts.unbind(), **named, **flags)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        truth.step()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype.is_complex else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(params, [p.detach() for p in theirs], **near)
    squares = [truth.state[p]["exp_avg_sq"] for p in theirs]
    torch.testing.assert_close(moments[1], squares, **near)


@covering(
    "backend",
    backend=BACKENDS,
    dtype=KERNEL_DTYPES,
    grad_layout=["channels_last", "contiguous", "sliced"],
)
def test_every_layout_gives_the_same_result(backend, dtype, grad_layout):
    values = torch.rand(3, 4, 5, 6).to(dtype)
    param = values.to(memory_format=torch.channels_last)
    ours, theirs = plan_of(backend, [param]), plan_of(backend, [values.clone()])
    hypers = hyper_rows({"weight_decay": 0.1})
    for _ in range(2):
        grad = torch.randn(3, 4, 5, 6).to(dtype)
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
@every_dtype
def test_threads_give_the_same_bits(dtype):
    params, gradients = make([100_000, 3, 70_000], dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        plan = plan_of("cpu", [p.clone() for p in params], amsgrad=True)
        for grads in gradients:
            take_step(plan, grads, hyper_rows({"amsgrad": True}))
        results.append(plan.params + plan.moments["max_exp_avg_sq"])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@every_dtype
def test_grad_scale_leaves_the_unscaled_gradient(backend, dtype):
    param, grad = torch.ones(600).to(dtype), torch.full((600,), 8.0).to(dtype)
    plan = plan_of(backend, [param])
    aligned, _ = take_step(plan, [grad], hyper_rows({}), grad_scale=4.0)
    assert (grad == 2).all()
    assert aligned[0] is grad
    [mean] = plan.moments["exp_avg"]
    assert torch.allclose(mean.double(), torch.tensor(0.2).double(), rtol=0.01)


def test_an_edited_count_is_honoured(backend):
    steps = torch.zeros(2)
    params = [torch.zeros(3), torch.zeros(3)]
    plan = plan_of(backend, params, steps=steps)
    hypers = hyper_rows({})
    for _ in range(2):
        take_step(plan, [torch.ones(3), torch.ones(3)], hypers)
    steps[1] = 6
    params[1].zero_()
    take_step(plan, [None, torch.ones(3)], hypers)
    m, v, k = 1 - 0.9**3, 1 - 0.99**3, 7
    expected = -LR / (1 - 0.9**k) * m / (math.sqrt(v / (1 - 0.99**k)) + 1e-8)
    torch.testing.assert_close(params[1], torch.full((3,), expected))
    assert steps.tolist() == [2, 7]


@pytest.mark.parametrize("kind", ["started", "unstarted"])
def test_unstarted_parameters_are_told(backend, kind):
    plan = plan_of(backend, [torch.ones(2), torch.ones(2)])
    assert plan.unstarted() == {0, 1}
    take_step(plan, [torch.ones(2), None if kind == "unstarted" else torch.ones(2)], hyper_rows({}))
    assert plan.unstarted() == ({1} if kind == "unstarted" else set())


def test_the_reference_takes_given_moments_at_step_0():
    plan = plan_of("reference", [torch.zeros(1)])
    plan.moments |= {"exp_avg": [torch.full((1,), 2.0)], "exp_avg_sq": [torch.zeros(1)]}
    take_step(plan, [torch.ones(1)], hyper_rows({}))
    torch.testing.assert_close(plan.moments["exp_avg"][0], torch.tensor([1.9]))


SEGMENTS = [
    (Segment(0, 8, 1.0), Segment(3, 0, 1.0)),  # frozen from step 3 on
    (Segment(0, 8, 0.5),),
]


def test_a_schedule_sets_rates_and_freezes(backend):
    params = [torch.ones(40), torch.ones(50), torch.ones(60)]
    steps, groups = torch.zeros(3), [0, 1, 1]
    plan = plan_of(
        backend, params, steps=steps, groups=groups, segments=SEGMENTS, eta_min=1e-3, warmup_steps=3
    )
    cases = [{"weight_decay": 0.1, "initial_lr": 0.2}, {"beta1": 0.5, "initial_lr": 0.1}]
    hypers = hyper_rows(*cases)
    rates = SegmentTable(SEGMENTS, 1e-3, 3)
    truths = [torchs(params[:1], cases[0]), torchs(params[1:], cases[1])]
    for step in range(5):
        grads = [torch.randn_like(p) for p in params]
        for truth, own, lr in zip(
            truths, (grads[:1], grads[1:]), rates.lrs(step, hypers[:, -1]), strict=True
        ):
            truth.param_groups[0]["lr"] = lr
            torch_step(truth, own if lr else [None])
        _, lrs = take_step(plan, grads, hypers, step)
        np.testing.assert_allclose(lrs, rates.lrs(step + 1, hypers[:, -1]), rtol=1e-15)
    expected = [p for truth in truths for p in truth.param_groups[0]["params"]]
    for ours, theirs in zip(params, expected, strict=True):
        assert_near(ours, theirs, torch.float32)
    assert steps.tolist() == [3, 5, 5]


@every_dtype
def test_special_values_spread_as_in_torch(backend, dtype):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 1e-4] * 9)
    for case in (CASES["amsgrad"], CASES["adam"], CASES["no_betas"]):
        param, grad = special.to(dtype), special.flip(0).roll(1).to(dtype)
        truth = torchs([param], case)
        plan = plan_of(backend, [param], amsgrad="amsgrad" in case, state_dtype=torch.float32)
        for _ in range(2):
            torch_step(truth, [grad])
            take_step(plan, [grad.clone()], hyper_rows(case))
        expected = truth.param_groups[0]["params"][0].detach()
        nan = expected.isnan()
        assert torch.equal(param.isnan(), nan)
        torch.testing.assert_close(param[~nan], expected[~nan].to(dtype))
        if "amsgrad" in case:
            largest = next(iter(truth.state.values()))["max_exp_avg_sq"]
            assert torch.equal(plan.moments["max_exp_avg_sq"][0].isnan(), largest.isnan())


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@covering(dtype=KERNEL_DTYPES, size=[1, 33, 2051], side=SIDES)
def test_nothing_beside_the_tensors_is_read_or_written(dtype, size, side):
    """A stray access ends the process."""
    param, grad, *moments = (guarded(torch.rand(size).to(dtype), side) for _ in range(5))
    steps = torch.ones(1)
    plan = AdamCpuPlan(
        replace(spec_of([param], steps=steps), moments=named(*([m] for m in moments)))
    )
    for count in (1.0, 0.0):
        steps.fill_(count)
        take_step(plan, [grad], hyper_rows({"amsgrad": True}), grad_scale=2.0)
    assert not param.isnan().any()


def test_bumps_the_version_of_what_it_updates(backend):
    params = [torch.ones(3), torch.ones(3)]
    plan = plan_of(backend, params)
    take_step(plan, [torch.ones(3), None], hyper_rows({}))
    assert [p._version > 0 for p in params] == [True, False]


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


def test_a_sparse_gradient_is_refused(backend):
    plan = plan_of(backend, [torch.ones(2)])
    with pytest.raises(ValueError, match="gradient"):
        take_step(plan, [torch.ones(2).to_sparse()], hyper_rows({}))


@needs_cpu_kernels
def test_an_unknown_plan_is_refused():
    with pytest.raises(RuntimeError, match="no Adam plan has the handle 123456789"):
        torch.ops.fastfreeze.adam_step(123456789, 0, 0, 0, 1.0, False, 0)
