"""The SGD kernels against the reference, in higher precision and over every layout."""

from __future__ import annotations

import math

import pytest
import torch

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.ops import _library
from fastfreeze.ops.reference import sgd_reference
from fastfreeze.ops.sgd import CPU_DTYPES, sgd
from tests.conftest import HAS_CPU_KERNELS, needs_cpu_kernels

HYPERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "dampened": {"momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
    "scaled": {"momentum": 0.9, "grad_scale": 8.0},
}
SIZES = [0, 1, 7, 31, 32, 33, 511, 512, 513, 4097, 8192, 8193, 70001]
# Relative to values of order one, after three steps: rounding once per step.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

every_hyper = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)


def make(sizes, dtype):
    params = [torch.rand(n, dtype=torch.float64).add(0.5).to(dtype) for n in sizes]
    steps = [[torch.randn(n, dtype=torch.float64).to(dtype) for n in sizes] for _ in range(3)]
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


@needs_cpu_kernels
@every_dtype
@every_hyper
def test_cpu_kernel_against_the_reference_in_fp64(isa, dtype, hyper):
    params, steps = make(SIZES, dtype)
    ours = run(sgd, params, steps, backend="cpu", **hyper)
    truth = run(
        sgd_reference,
        [p.double() for p in params],
        [[g.double() for g in s] for s in steps],
        **hyper,
    )
    assert_near(ours[0], truth[0], dtype)
    assert_near(ours[1], truth[1], dtype)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_hyper
def test_within_an_ulp_of_torchs_for_loop(dtype, hyper):
    hyper = {k: v for k, v in hyper.items() if k != "grad_scale"}
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
    wide = torch.full((6, 40, 6, 6), math.nan, dtype=base.dtype)
    sliced = wide[:, ::2][:, :8]
    unaligned = torch.full((base.numel() + 1,), math.nan, dtype=base.dtype)[1:].view(base.shape)
    return {
        "contiguous": torch.empty_like(base),
        "channels_last": torch.empty_like(base, memory_format=torch.channels_last),
        "transposed": torch.empty(6, 6, 8, 6, dtype=base.dtype).permute(3, 2, 1, 0),
        "sliced": sliced,
        "unaligned": unaligned,
    }


@every_dtype
@pytest.mark.parametrize(
    "param_layout", ["contiguous", "channels_last", "transposed", "sliced", "unaligned"]
)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "sliced", "unaligned"])
def test_every_layout_gives_the_same_result(dtype, param_layout, grad_layout):
    base, grads = torch.randn(6, 8, 6, 6).to(dtype), torch.randn(3, 6, 8, 6, 6).to(dtype)
    plain = [base.clone()]
    mixed = [layouts(base)[param_layout].copy_(base)]
    buffers, mixed_buffers = [None], [None]
    hyper = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    for g in grads:
        sgd(plain, [g.clone()], buffers, **hyper)
        sgd(mixed, [layouts(base)[grad_layout].copy_(g)], mixed_buffers, **hyper)
    # torch's own operations, and so the reference (where tensors with gaps go), do not give the
    # same bits for every layout.
    by_kernel = HAS_CPU_KERNELS and param_layout != "sliced"
    tolerance = 0 if by_kernel else TOLERANCE[dtype]
    torch.testing.assert_close(mixed[0], plain[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixed_buffers[0], buffers[0], rtol=tolerance, atol=tolerance)


@needs_cpu_kernels
@every_dtype
@pytest.mark.parametrize("size", [1, 31, 33, 513, 8193])
def test_writes_nothing_outside_its_tensors(isa, dtype, size):
    guard = 64
    memory = torch.full((4, size + 2 * guard), math.nan, dtype=dtype)
    inside = memory[:, guard : guard + size]
    inside.copy_(torch.randn(4, size))
    others = torch.randn(size).to(dtype)
    sgd(
        [inside[0], others], [inside[1], torch.randn(size).to(dtype)], [inside[2], None],
        lr=0.1, momentum=0.9, grad_scale=2.0, backend="cpu",
    )  # fmt: skip
    assert not inside.isnan().any()
    assert memory[:, :guard].isnan().all()
    assert memory[:, guard + size :].isnan().all()


@needs_cpu_kernels
def test_special_values_spread_as_in_torch():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-45] * 9)
    for dtype in CPU_DTYPES:
        param, grad = special.to(dtype), special.flip(0).roll(1).to(dtype)
        ours, theirs = [param.clone()], [param.clone()]
        sgd(ours, [grad.clone()], [None], lr=0.5, momentum=0.9, backend="cpu")
        sgd_reference(theirs, [grad.clone()], [None], lr=0.5, momentum=0.9)
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)


@needs_cpu_kernels
@every_dtype
def test_threads_give_the_same_bits(dtype):
    params, steps = make([200_000, 3, 70_000], dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(sgd, params, steps, momentum=0.9, backend="cpu")[0])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_missing_gradient_leaves_its_parameter(backend):
    params = [torch.ones(5), torch.ones(5)]
    buffers = [None, None]
    sgd(params, [torch.ones(5), None], buffers, lr=0.5, momentum=0.9, backend=backend)
    assert params[0].tolist() == [0.5] * 5
    assert params[1].tolist() == [1.0] * 5
    assert buffers[1] is None


def test_grad_scale_leaves_the_unscaled_gradient(backend):
    grad = torch.full((3,), 8.0)
    param = torch.zeros(3)
    sgd([param], [grad], [None], lr=1.0, grad_scale=4.0, backend=backend)
    assert grad.tolist() == [2.0] * 3
    assert param.tolist() == [-2.0] * 3


def test_grad_scale_reaches_a_gradient_of_other_strides(backend):
    param = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    grad = torch.full((2, 3, 4, 4), 8.0)
    sgd([param], [grad], [None], lr=1.0, grad_scale=4.0, backend=backend)
    assert (grad == 2).all()
    assert (param == -2).all()


@needs_cpu_kernels
def test_bumps_the_version_counter():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        sgd([weight], [torch.ones(3)], [None], lr=0.1, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("params", "grads", "buffers", "backend", "message"),
    [
        ([torch.ones(2)], [], [None], None, "must have equal lengths, got 1, 0 and 1"),
        ([torch.ones(2)], [torch.ones(3)], [None], None, r"grads\[0\] must match its parameter"),
        ([torch.ones(2)], [torch.ones(2).double()], [None], None, r"grads\[0\] must match"),
        ([torch.ones(2)], [torch.ones(2)], [torch.ones(1)], None, r"momentum_buffers\[0\] must"),
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
            "cannot take the torch.sparse_coo gradient", marks=needs_cpu_kernels,
        ),
    ],
)  # fmt: skip
def test_bad_values_change_nothing(params, grads, buffers, backend, message):
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=message):
        sgd(params, grads, buffers, lr=0.1, momentum=0.9, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_an_unavailable_backend_says_what_there_is():
    missing = [n for n, a in _library.backends().items() if not a.available]
    if not missing:
        pytest.skip("every backend can run here")
    with pytest.raises(BackendUnavailableError, match=r"cannot run here .*reference"):
        sgd([torch.ones(1)], [torch.ones(1)], [None], lr=0.1, backend=missing[0])


@needs_cpu_kernels
def test_an_unknown_plan_is_refused():
    with pytest.raises(RuntimeError, match="no SGD plan has the handle 123456789"):
        torch.ops.fastfreeze.sgd_step(123456789, 0, 0, 0, 1.0, False, 0)
