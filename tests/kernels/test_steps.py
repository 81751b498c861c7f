"""The optimizers' plans against torch's for-loop in float64, over dtypes, layouts and counts."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastfreeze.kernels.choice import PLANS
from fastfreeze.kernels.library import KERNEL_DTYPES
from tests.conftest import needs_cpu_kernels, needs_gpu, resolved, sgd_kernels
from tests.covering import covering
from tests.kernels.conftest import STEPPERS, by_steppers
from tests.kernels.guard import SIDES, by_threads, guarded
from tests.kernels.steps import (
    CASES,
    EACH_RULE,
    LR,
    MOMENTS,
    TORCHS,
    Beside,
    Case,
    assert_right,
    random_gradient,
    spec_of,
    table_of,
    take_step,
)

SIZES = [0, 1, 7, 31, 33, 511, 513, 2047, 2049, 8193, 20001]


@pytest.fixture(params=sgd_kernels())
def backend_and_device(request):
    return resolved(request)


@by_steppers(dtype=KERNEL_DTYPES, case=CASES, offset={"": 0, "unaligned": 1})
def test_against_torchs_for_loop_in_fp64(stepper, dtype, case, offset):
    backend, device = stepper

    def tensors(make):
        return [make(n + offset).to(device, dtype)[offset:] for n in SIZES]

    assert_right(backend, case, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_reference_is_torchs_for_loop_bit_for_bit(dtype):
    for case in CASES.values():
        params = [torch.randn(37, dtype=dtype) for _ in range(2)]
        theirs = [torch.nn.Parameter(p.clone()) for p in params]
        truth = TORCHS[case.rule]([case.group(p) for p in theirs], foreach=False)
        counts = torch.zeros(2) if case.rule == "adam" else None
        plan = PLANS["reference"](spec_of(params, case, steps=counts))
        for step in range(3):
            grads = [torch.randn_like(p) for p in params]
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g.clone()
            truth.step()
            take_step(plan, table_of(case), grads, step)
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype.is_complex else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(params, [p.detach() for p in theirs], **near)
        for name in case.kept():
            moments = [truth.state[p][name] for p in theirs]
            torch.testing.assert_close(plan.moments[name], moments, **near)


def laid_out(values, layout):
    """The same values, with NaN where nothing is to be read."""
    wide = torch.full((6, 16, 6, 6), math.nan, dtype=values.dtype, device=values.device)
    return {
        "contiguous": lambda: torch.empty_like(values),
        "channels_last": lambda: values.to(memory_format=torch.channels_last, copy=True),
        "transposed": lambda: values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced": lambda: wide[:, ::2],
        "unaligned": lambda: wide.flatten()[1 : 1 + values.numel()].view(values.shape),
    }[layout]().copy_(values)


@by_steppers(
    dtype=KERNEL_DTYPES,
    case=EACH_RULE,
    param_layout=["contiguous", "channels_last", "transposed", "unaligned"],
    grad_layout=["contiguous", "channels_last", "sliced", "unaligned"],
)
def test_every_layout_gives_the_same_result(stepper, dtype, case, param_layout, grad_layout):
    """Gradients are left unscaled, also those of other strides than their parameters."""
    backend, device = stepper
    values = torch.rand(6, 8, 6, 6).to(device, dtype)
    case = case._replace(grad_scale=4.0)
    mixed = Beside(backend, [laid_out(values, param_layout)], case)
    plain = Beside(backend, [values.clone()], case)
    for step in range(3):
        grad = random_gradient(values.shape).to(device, dtype)
        mixed.step([laid_out(grad, grad_layout)], step)
        plain.step([grad.clone()], step)
    # torch's own operations, and so the reference, do not give the same bits for every layout.
    near = 0.02 if backend == "reference" else 0
    torch.testing.assert_close(mixed.params, plain.params, rtol=near, atol=near)
    for name in case.kept():
        (own,), (other,) = mixed.plan.moments[name], plain.plan.moments[name]
        assert backend == "reference" or own.stride() == mixed.params[0].stride()
        torch.testing.assert_close(own, other, rtol=near, atol=near)


@needs_cpu_kernels
@pytest.mark.parametrize("case", EACH_RULE.values(), ids=EACH_RULE)
def test_threads_give_the_same_bits(case):
    def stepped(params, steps):
        beside = Beside("cpu", [p.clone() for p in params], case)
        for grads in steps:
            take_step(beside.plan, beside.table, grads)
        return [*beside.plan.params, *beside.plan.moments[case.kept()[-1]]]

    for dtype in KERNEL_DTYPES:
        params, *steps = (
            [random_gradient(n).to(dtype) for n in (100_000, 3, 70_000)] for _ in range(4)
        )
        one, three = by_threads(lambda d=(params, steps): stepped(*d), (1, 3))
        assert all(map(torch.equal, one, three))


def test_groups_in_one_launch_whose_parameters_count_for_themselves(backend, device):
    """Each group with values of its own, one with amsgrad; counts also from what a user writes."""
    cases = [
        Case("adam", {"weight_decay": 0.1}),
        Case("adam", {"lr": 0.02, "beta1": 0.5, "beta2": 0.6, "amsgrad": True, "decoupled": False}),
        Case("adam", {"lr": 0.03, "eps": 0.1, "maximize": True, "beta1": 0.0, "beta2": 0.99999}),
    ]
    params = [torch.rand(n, device=device) for n in (33, 2048, 2049, 1)]
    beside = Beside(backend, params, *cases, groups=[0, 1, 2, 1])
    for step in range(5):
        grads = [random_gradient(p.shape).to(device) for p in params]
        grads[1] = None if step == 1 else grads[1]
        for i, count in {3: [(1, 40)], 4: [(2, 100_000)]}.get(step, []):
            beside.steps[i] = count
            beside.truth.state[beside.wide[i]]["step"].fill_(count)
        assert beside.step(grads, step) == pytest.approx([LR, 0.02, 0.03])
    beside.assert_near()


@pytest.mark.parametrize("case", EACH_RULE.values(), ids=EACH_RULE)
def test_more_tensors_than_a_launch_has_arguments_or_looks_at_together(backend, device, case):
    most = max(128, getattr(PLANS[backend], "table_from", 0))
    sizes = [1 + i % 7 for i in range(most + 1)]
    assert_right(backend, case, lambda make: [make(n).to(device) for n in sizes], 1)


@pytest.mark.parametrize("case", EACH_RULE.values(), ids=EACH_RULE)
def test_unstarted_and_written_parameters_are_told(backend, device, case):
    params = [torch.ones(2, device=device), torch.ones(2049, device=device)]
    beside = Beside(backend, params, case, first=True)
    plan, grads = beside.plan, [torch.ones_like(p) for p in params]
    assert plan.unstarted() == {0, 1}
    if plan.on_device:
        take_step(plan, beside.table, grads, found_inf=torch.ones((), device=device))
        assert plan.unstarted() == {0, 1}
        assert not any(t.any() for moments in plan.moments.values() for t in moments)
    step, before = int(plan.on_device), [p._version for p in params]
    take_step(plan, beside.table, [None, grads[1]], step)
    assert plan.unstarted() == {0}
    assert [p._version > b for p, b in zip(params, before, strict=True)] == [False, True]
    take_step(plan, beside.table, grads, step + 1)
    assert plan.unstarted() == set()


@covering(
    "backend_and_device",
    backend_and_device=sgd_kernels(),
    dtype=KERNEL_DTYPES,
    case={name: CASES[name] for name in ("nesterov", "adam", "amsgrad", "no betas")},
)
def test_special_values_spread_as_in_torch(backend, device, dtype, case):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 1e-4] * 9)
    param, grad = special.to(device, dtype), special.flip(0).roll(1).to(device, dtype)
    beside = Beside(backend, [param], case._replace(wide=torch.float32))
    for step in range(2):
        beside.wide[0].grad = grad.cpu().double()
        beside.truth.step()
        take_step(beside.plan, beside.table, [grad.clone()], step)
    expected, found = beside.wide[0].detach(), param.cpu()
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    torch.testing.assert_close(found[~nan], expected[~nan].to(dtype))
    for name in case.kept():
        moment, truth = beside.plan.moments[name][0].cpu(), beside.truth.state[beside.wide[0]][name]
        assert torch.equal(moment.isnan(), truth.isnan())


@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@by_steppers(
    [p for p in STEPPERS if p.values[0][0] != "reference" and p.values[0][1] != "cuda"],
    dtype=KERNEL_DTYPES,
    case=EACH_RULE,
    size=[1, 33, 513, 2048, 2051],
    side=SIDES,
)
def test_nothing_beside_the_tensors_is_read_or_written(stepper, dtype, case, size, side):
    """A stray access ends the process."""
    names = MOMENTS[case.rule]
    param, grad, *own = (guarded(torch.rand(size).to(dtype), side) for _ in range(2 + len(names)))
    for first in (False, True):
        moments = {name: [moment] for name, moment in zip(names, own, strict=True)}
        beside = Beside(stepper[0], [param], case, moments=moments, first=first)
        if beside.steps is not None:
            beside.steps.fill_(float(not first))
        take_step(beside.plan, beside.table, [grad], grad_scale=2.0)
    assert not param.isnan().any()


@needs_gpu
@covering(
    "stepper",
    stepper=[p for p in STEPPERS if p.values[0][1] == "cuda"] or STEPPERS[:1],
    case=EACH_RULE,
)
def test_writes_nothing_outside_its_tensors_on_a_gpu(stepper, case):
    for dtype in KERNEL_DTYPES:
        memory = []

        def tensors(make, dtype=dtype, memory=memory):
            for n in SIZES:
                memory.append(torch.full((n + 128,), math.nan, dtype=dtype, device=stepper[1]))
                memory[-1][64 : 64 + n] = make(n)
            return [flat[64:-64] for flat in memory[-len(SIZES) :]]

        assert_right(stepper[0], case._replace(grad_scale=2.0), tensors)
        assert all(flat.isnan().sum() == 128 for flat in memory)


AMSGRAD = Case("adam", {"amsgrad": True})
UNFIT = {
    "moments": ({"moments": dict.fromkeys(MOMENTS["adam"], [None] * 2)}, "1 has a gradient and no"),
    "rows": ({"steps": torch.zeros(3)}, "progress must have a row for each tensor"),
    "dtype": ({"steps": torch.zeros(2).double()}, "progress has the wrong dtype"),
    "strides": ({"steps": torch.zeros(4)[::2]}, "progress must be contiguous"),
    "group": ({"groups": [0, 7]}, "a tensor names group 7"),
    "state": ({"wide": torch.float64}, "a float16 parameter has a state of float64"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_the_kernel_refuses_what_does_not_fit(change, message):
    params = [torch.ones(2).half(), torch.ones(3).half()]
    spec = spec_of(params, AMSGRAD._replace(wide=change.get("wide")), steps=torch.zeros(2))
    spec.moments |= change.get("moments", {})
    spec.groups, spec.steps = change.get("groups", spec.groups), change.get("steps", spec.steps)
    with pytest.raises(RuntimeError, match=message):
        take_step(PLANS["cpu"](spec), table_of(AMSGRAD), [None, torch.ones(3).half()])
    assert all((p == 1).all() for p in params)


@needs_cpu_kernels
@pytest.mark.parametrize(("rule", "name"), [("sgd", "SGD"), ("adam", "Adam")])
def test_an_unknown_plan_is_refused(rule, name):
    with pytest.raises(RuntimeError, match=f"no {name} plan has the handle 123456789"):
        getattr(torch.ops.fastfreeze, f"{rule}_step")(123456789, 0, 0, 0, 1.0, False, 0)
