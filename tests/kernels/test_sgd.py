"""The SGD kernels against the reference, in higher precision and over every layout."""

from __future__ import annotations

import math
import sys
from itertools import product

import pytest
import torch

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.kernels import library
from fastfreeze.kernels.plans import KERNEL_DTYPES
from fastfreeze.kernels.reference import sgd_reference
from tests.conftest import needs_cpu_kernels, needs_gpu, resolved, sgd_kernels
from tests.kernels.conftest import STEPPERS, by_steppers
from tests.kernels.guard import SIDES, by_threads, guarded
from tests.kernels.sgd_steps import sgd

HYPERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "dampened": {"momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
    "scaled": {"momentum": 0.9, "grad_scale": 8.0},
    "wide": {"momentum": 0.9, "nesterov": True, "momentum_dtype": torch.float32},
}
SIZES = [0, 1, 7, 31, 32, 33, 511, 512, 513, 2047, 2048, 2049, 4097, 8192, 8193, 70001]
# Relative to values of order one, after three steps: rounding once per step.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=sgd_kernels())
def backend_and_device(request):
    return resolved(request)


def make(sizes, dtype, device="cpu"):
    params = [torch.rand(n, dtype=torch.float64).add(0.5).to(device, dtype) for n in sizes]
    steps = [
        [torch.randn(n, dtype=torch.float64).to(device, dtype) for n in sizes] for _ in range(3)
    ]
    return params, steps


def run(function, params, steps, **kwargs):
    params = [p.clone() for p in params]
    buffers = [None] * len(params)
    for grads in steps:
        function(params, [g.clone() for g in grads], buffers, lr=0.1, **kwargs)
    return params, buffers


def assert_near(ours, truth, dtype):
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        if b is None:
            assert a is None
            continue
        error = (a.double() - b).abs() / b.abs().clamp(min=1)
        assert not error.isnan().any(), f"tensor {i}"
        assert a.numel() == 0 or error.max() <= TOLERANCE[dtype], f"tensor {i}"


@by_steppers(dtype=KERNEL_DTYPES, hyper=HYPERS)
def test_against_the_reference_in_fp64(stepper, dtype, hyper):
    params, steps = make(SIZES, dtype, stepper[1])
    ours = run(sgd, params, steps, backend=stepper[0], **hyper)
    wide = [p.double() for p in params], [[g.double() for g in s] for s in steps]
    truth = run(sgd_reference, *wide, **hyper)
    assert_near(ours[0], truth[0], dtype)
    assert_near(ours[1], truth[1], dtype)
    if "momentum" in hyper:
        widened = "momentum_dtype" in hyper and dtype in (torch.float16, torch.bfloat16)
        assert {b.dtype for b in ours[1]} == {torch.float32 if widened else dtype}


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov", "dampened"])
def test_within_an_ulp_of_torchs_for_loop(dtype, name):
    hyper = HYPERS[name]
    params, steps = make(SIZES, dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.SGD(theirs, lr=0.1, foreach=False, **hyper)
    ours, buffers = [p.clone() for p in params], [None] * len(params)
    for grads in steps:
        for p, q, g in zip(theirs, ours, grads, strict=True):
            p.grad = g.clone()
            q.copy_(p.detach())  # each step from the same start
            state = optimizer.state.get(p, {})
            if "momentum_buffer" in state:
                i = next(i for i, t in enumerate(theirs) if t is p)
                buffers[i] = state["momentum_buffer"].clone()
        optimizer.step()
        sgd(ours, grads, buffers, lr=0.1, backend="cpu", **hyper)
        for p, q in zip(theirs, ours, strict=True):
            ulp = (torch.nextafter(p, torch.full_like(p, math.inf)) - p).detach()
            assert ((p - q).abs() <= ulp).all()


def layouts(base):
    like = {"dtype": base.dtype, "device": base.device}
    wide = torch.full((6, 40, 6, 6), math.nan, **like)
    sliced = wide[:, ::2][:, :8]
    unaligned = torch.full((base.numel() + 1,), math.nan, **like)[1:].view(base.shape)
    return {
        "contiguous": torch.empty_like(base),
        "channels_last": torch.empty_like(base, memory_format=torch.channels_last),
        "transposed": torch.empty(6, 6, 8, 6, **like).permute(3, 2, 1, 0),
        "sliced": sliced,
        "unaligned": unaligned,
    }


@by_steppers(
    dtype=KERNEL_DTYPES,
    param_layout=["contiguous", "channels_last", "transposed", "sliced", "unaligned"],
    grad_layout=["contiguous", "channels_last", "sliced", "unaligned"],
)
def test_every_layout_gives_the_same_result(stepper, dtype, param_layout, grad_layout):
    backend, device = stepper
    if param_layout == "sliced":  # gaps: the reference's alone
        backend = None
    base = torch.randn(6, 8, 6, 6).to(device, dtype)
    grads = torch.randn(3, 6, 8, 6, 6).to(device, dtype)
    plain = [base.clone()]
    mixed = [layouts(base)[param_layout].copy_(base)]
    buffers, mixed_buffers = [None], [None]
    hyper = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    for g in grads:
        sgd(plain, [g.clone()], buffers, backend=backend, **hyper)
        sgd(mixed, [layouts(base)[grad_layout].copy_(g)], mixed_buffers, backend=backend, **hyper)
    # torch's own operations, and so the reference, do not give the same bits for every layout.
    tolerance = TOLERANCE[dtype] if backend in (None, "reference") else 0
    torch.testing.assert_close(mixed[0], plain[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixed_buffers[0], buffers[0], rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize(
    "stepper", [p for p in STEPPERS if p.values[0][1] == "cuda"] or STEPPERS[:1], indirect=True
)
def test_writes_nothing_outside_its_tensors_on_a_gpu(stepper):
    guard = 64
    for dtype, size in product(KERNEL_DTYPES, (1, 31, 33, 513, 2048, 8193)):
        memory = torch.full((4, size + 2 * guard), math.nan, dtype=dtype, device=stepper[1])
        inside = memory[:, guard : guard + size]
        inside.copy_(torch.randn(4, size))
        others = torch.randn(2, size).to(stepper[1], dtype)
        sgd(
            [inside[0], others[0]], [inside[1], others[1]], [inside[2], None],
            lr=0.1, momentum=0.9, grad_scale=2.0, backend=stepper[0],
        )  # fmt: skip
        assert not inside.isnan().any()
        assert memory[:, :guard].isnan().all()
        assert memory[:, guard + size :].isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@by_steppers(
    [p for p in STEPPERS if p.values[0][0] != "reference" and p.values[0][1] != "cuda"],
    dtype=KERNEL_DTYPES,
    size=[1, 33, 513, 2048, 2051, 8193],
    side=SIDES,
)
def test_nothing_beside_the_tensors_is_read_or_written(stepper, dtype, size, side):
    """A stray access ends the process."""
    param, grad, buffer = (guarded(torch.rand(size).to(dtype), side) for _ in range(3))
    hyper = {"lr": 0.1, "momentum": 0.9, "grad_scale": 2.0, "backend": stepper[0]}
    sgd([param], [grad], [buffer], **hyper)
    sgd([param], [grad], [None], **hyper)
    assert not param.isnan().any()


def test_special_values_spread_as_in_torch(backend, device):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-45] * 9)
    for dtype in KERNEL_DTYPES:
        param, grad = special.to(dtype), special.flip(0).roll(1).to(dtype)
        ours, theirs = [param.to(device)], [param.clone()]
        sgd(ours, [grad.to(device)], [None], lr=0.5, momentum=0.9, backend=backend)
        sgd_reference(theirs, [grad.clone()], [None], lr=0.5, momentum=0.9)
        torch.testing.assert_close(ours[0].cpu(), theirs[0], equal_nan=True)


@needs_cpu_kernels
def test_threads_give_the_same_bits():
    for dtype in KERNEL_DTYPES:
        data = make([200_000, 3, 70_000], dtype)
        one, two = by_threads(lambda d=data: run(sgd, *d, momentum=0.9, backend="cpu")[0], (1, 2))
        assert all(map(torch.equal, one, two))


def test_gradients_that_are_missing_and_of_a_scaled_loss(backend, device):
    """The latter are left unscaled, also those of other strides than their parameters."""
    images = torch.zeros(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
    params = [torch.ones(5, device=device), torch.zeros(3, device=device), images]
    grads = [None, *(torch.full(p.shape, 8.0, device=device) for p in params[1:])]
    buffers = [None] * 3
    sgd(params, grads, buffers, lr=1.0, momentum=0.9, grad_scale=4.0, backend=backend)
    assert params[0].tolist() == [1.0] * 5
    assert buffers[0] is None
    for p, g in zip(params[1:], grads[1:], strict=True):
        assert (g == 2).all()
        assert (p == -2).all()


def test_bumps_the_version_counter(backend, device):
    weight = torch.ones(3, requires_grad=True, device=device)
    loss = (weight * weight).sum()
    with torch.no_grad():
        sgd([weight], [torch.ones(3, device=device)], [None], lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("params", "grads", "buffers", "backend", "message"),
    [
        ([torch.ones(2)], [torch.ones(2)], [None], "gpu", "backend must be one of"),
        pytest.param(
            [torch.ones(2, dtype=torch.cfloat)], [torch.ones(2, dtype=torch.cfloat)], [None], "cpu",
            "cannot take parameter 0: its dtype is torch.complex64", marks=needs_cpu_kernels,
        ),
        pytest.param(
            [torch.ones(1).expand(4)], [torch.ones(4)], [None], "cpu",
            "cannot take parameter 0: its elements overlap", marks=needs_cpu_kernels,
        ),
        pytest.param(
            [torch.ones(4)], [torch.ones(4).to_sparse()], [None], "cpu",
            "0: its gradient is torch.float32 and torch.sparse_coo", marks=needs_cpu_kernels,
        ),
    ],
)  # fmt: skip
def test_bad_values_change_nothing(params, grads, buffers, backend, message):
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=message):
        sgd(params, grads, buffers, lr=0.1, momentum=0.9, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_an_unavailable_backend_says_what_there_is():
    missing = [n for n, a in library.backends().items() if not a.available]
    if not missing:
        pytest.skip("every backend can run here")
    with pytest.raises(BackendUnavailableError, match=r"cannot run here .*reference"):
        sgd([torch.ones(1)], [torch.ones(1)], [None], lr=0.1, backend=missing[0])


@needs_cpu_kernels
def test_an_unknown_plan_is_refused():
    with pytest.raises(RuntimeError, match="no SGD plan has the handle 123456789"):
        torch.ops.fastfreeze.sgd_step(123456789, 0, 0, 0, 1.0, False, 0)
