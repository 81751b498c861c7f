"""The softmax kernels against fp64, over sizes, layouts and extreme logits; what they refuse."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.kernels import library, softmax
from fastfreeze.kernels.softmax import EnsembleAverage, ensemble_softmax, ensemble_statistics
from fastfreeze.kernels.softmax_arguments import choose_backend
from tests.conftest import ISAS, kernels, needs_cpu_kernels, operators
from tests.covering import covering
from tests.kernels.guard import guarded
from tests.kernels.softmax_cases import (
    BAD,
    COUNTS,
    DTYPES,
    EXTREME_ROWS,
    INF,
    NAN,
    assert_logs_near,
    assert_near,
    every_backend_case,
    every_kernel_case,
    log_truth,
    make,
    skip_unless_taken,
    truth,
)

MEAN_AND_LOG = {"mean": False, "log": True}


def assert_backend_is_right(backend, device, shape, dtype, option):
    weights, temperature = option
    members = make(shape, 4, dtype, device)
    skip_unless_taken(backend, members)
    options = {"weights": weights, "temperature": temperature, "backend": backend}
    mean = ensemble_softmax(members, **options)
    assert (mean.dtype, mean.device) == (dtype, members[0].device)
    assert_near(mean, members, weights, temperature)
    assert torch.equal(ensemble_softmax(torch.stack(members), **options), mean)
    log = ensemble_softmax(members, log=True, **options)
    assert log.dtype == dtype
    assert_logs_near(log, log_truth(members, weights, temperature))


@every_kernel_case
def test_kernel_against_fp64(isa, dtype, shape, option):
    assert_backend_is_right("cpu", "cpu", shape, dtype, option)


@every_backend_case
def test_backends_against_fp64(backend, device, dtype, shape, option):
    assert_backend_is_right(backend, device, shape, dtype, option)


@pytest.mark.parametrize("classes", [3, 40, 2100])
def test_extreme_temperatures(backend, device, classes):
    """Near 0 only the largest counts, and far above all do alike, but for masked ones."""
    logits = torch.randn(2, classes).mul(1e3)
    logits[:, 0], logits[:, 1] = 1e4, -INF
    coldest = torch.tensor([1.0] + [0.0] * (classes - 1)).expand(2, -1)
    hottest = torch.full((2, classes), 1 / (classes - 1))
    hottest[:, 1] = 0
    for temperature, scale, expected in [(1e-30, 3e34, coldest), (1e30, 1.0, hottest)]:
        scaled = logits.mul(scale).to(device)
        mean = ensemble_softmax([scaled], temperature=temperature, backend=backend)
        torch.testing.assert_close(mean.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [2, 40, 2100])
def test_logarithms_from_the_largest_to_the_smallest(isa, classes):
    gaps = torch.cat([torch.linspace(0, 200, 3001), torch.tensor([700.0, 1e4, 1e30, 3e38])])
    logits = torch.full((len(gaps), classes), -INF)
    logits[:, -1], logits[:, 0] = -gaps, 0.0
    log = ensemble_softmax([logits, logits], log=True, backend="cpu")
    assert_logs_near(log, log_truth([logits]))


def test_logarithms_of_what_underflows(backend, device):
    """The second member alone knows class 1, and has a weight of its own."""
    first, second = torch.tensor([[0.0, -INF, -3e4]]), torch.tensor([[0.0, -500.0, -INF]])
    members = [first.to(device), second.to(device)]
    log = ensemble_softmax(members, weights=[3, 1], log=True, backend=backend).cpu()
    expected = torch.tensor([[0.0, -501.3862944, -30000.2876821]])
    torch.testing.assert_close(log, expected, rtol=1e-6, atol=1e-6)


@covering("isa", isa=ISAS, dtype=[torch.float32, torch.bfloat16], count=COUNTS)
def test_any_number_of_members(isa, dtype, count):
    members, classes = count
    logits = make((5, classes), members, dtype)
    assert_near(ensemble_softmax(logits, backend="cpu"), logits)


@needs_cpu_kernels
def test_sums_over_many_classes_stay_accurate(isa):
    members = [torch.rand(2, 50257) for _ in range(2)]  # nearly uniform: all terms count
    assert_near(ensemble_softmax(members, backend="cpu"), members)


def poisoned(shape):
    return torch.full(shape, NAN)


LAYOUTS = {
    "rows apart": lambda b, c: poisoned((b, c + 7))[:, 3 : 3 + c],
    "every other row": lambda b, c: poisoned((2 * b, c))[::2],
    "unaligned": lambda b, c: poisoned((b * c + 3,))[1 : 1 + b * c].view(b, c),
    "transposed": lambda b, c: poisoned((c, b)).t(),
    "every other class": lambda b, c: poisoned((b, 2 * c))[:, ::2],
    "channels last": lambda b, c: (
        poisoned((2, c, 3, b)).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "channels first": lambda b, c: poisoned((2, c, 3, b)).permute(0, 2, 3, 1),
    "batch transposed": lambda b, c: poisoned((3, b, c)).transpose(0, 1),
    "batch sliced": lambda b, c: poisoned((3, b + 1, c))[:, :b],
}


@needs_cpu_kernels
@covering(layout=LAYOUTS, classes=[5, 19, 2500])
def test_layouts(layout, classes):
    members = [layout(4, classes) for _ in range(3)]
    for z in members:
        z.copy_(torch.randn(z.shape))
    mean = ensemble_softmax(members, dim=-1, backend="cpu")
    close_by = [z.contiguous() for z in members]
    assert torch.equal(mean, ensemble_softmax(close_by, dim=-1, backend="cpu"))
    assert_near(mean, members)


@needs_cpu_kernels
def test_one_row_for_all():
    row = torch.randn(1, 40)
    mean = ensemble_softmax([row.expand(9, 40)] * 2, backend="cpu")
    assert_near(mean, [row.expand(9, 40)])


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@covering("isa", isa=ISAS, dtype=DTYPES, classes=[1, 2, 10, 17, 31, 33, 100, 2049])
def test_nothing_past_the_end_is_read_or_written(isa, classes, dtype):
    """A stray access ends the process."""
    rows = [guarded(z) for z in make((3, classes), 2, dtype)]
    assert_near(torch.ops.fastfreeze.ensemble_softmax(rows, None, 1.0, False), rows)
    total_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    total = guarded(torch.rand(3, classes, dtype=total_dtype))
    out = guarded(torch.full_like(total, NAN))
    torch.ops.fastfreeze.softmax_add(out, None, total, rows[0], 1.0, 1.0)
    torch.testing.assert_close(out.double(), total.double() + truth(rows[:1]), rtol=1e-6, atol=0)
    log = torch.ops.fastfreeze.ensemble_softmax(rows, None, 1.0, True)
    assert_logs_near(log, log_truth(rows))


@needs_cpu_kernels
@pytest.mark.parametrize("classes", [2, 40, 2100])
def test_exponentials_from_the_largest_to_the_smallest(isa, classes):
    gaps = torch.cat([torch.linspace(0, 104, 3001), torch.tensor([87.3, 87.4, 103.9, 105, 1e30])])
    logits = torch.full((len(gaps), classes), -INF)
    logits[:, -1], logits[:, 0] = -gaps, 0.0
    mean = ensemble_softmax([logits], backend="cpu")
    expected = logits.double().softmax(-1)
    assert ((mean.double() - expected).abs() <= 3e-7 * expected + 1.5e-45).all()
    assert (mean[:, 1:-1] == 0).all()


@covering(
    "backend_and_device", backend_and_device=kernels(), row=EXTREME_ROWS, copies=[1, 20, 1000]
)
def test_extreme_rows(backend, device, row, copies):
    logits = torch.tensor([row * copies], device=device)
    assert_near(ensemble_softmax([logits], backend=backend), [logits])


@needs_cpu_kernels
@pytest.mark.parametrize("classes", [7, 16, 150, 2200])
def test_the_largest_is_found_wherever_it_is(isa, classes):
    logits = torch.eye(classes).mul(2e4) - 1e4
    assert torch.equal(ensemble_softmax([logits], backend="cpu"), torch.eye(classes))


@pytest.mark.parametrize("masked", [slice(0, 2048), slice(2048, 4096), slice(4000, 4096)], ids=str)
def test_masked_stretch_of_a_long_row(backend, device, masked):
    logits = torch.randn(2, 4096, device=device) - 700.0
    logits[:, masked] = -INF
    mean = ensemble_softmax([logits], backend=backend)
    assert (mean[:, masked] == 0).all()
    assert_near(mean, [logits])


@needs_cpu_kernels
@covering(
    log=MEAN_AND_LOG,
    shape=[(9001, 10), (2001, 50), (33, 4097)],
    dtype=[torch.float32, torch.float16],
)
def test_number_of_threads_changes_no_bit(log, shape, dtype):
    members = make(shape, 5, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ensemble_softmax(members, log=log, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@covering(
    "backend_and_device",
    backend_and_device=kernels(),
    log=MEAN_AND_LOG,
    classes=[10, 100, 4000],
    bad=BAD,
)
def test_a_bad_row_is_named(backend, device, log, classes, bad):
    found = "-inf throughout" if bad == -INF else str(bad)
    members = make((2, 3, classes), 3, torch.float32, device)
    members[1][1, 2, 0 if bad != -INF else slice(None)] = bad
    if device.type != "cpu":  # to look would be to wait
        mean = ensemble_softmax(members, log=log, backend=backend)
        assert mean.isnan().all(-1).tolist() == [[False] * 3, [False, False, True]]
        assert mean.isnan().sum() == classes
        return
    message = rf"members\[1\]\[1, 2\] must be finite, or -inf for some classes, got {found}"
    with pytest.raises(ValueError, match=message):
        ensemble_softmax(members, log=log, backend=backend)


@covering("isa", isa=ISAS, log=MEAN_AND_LOG, classes=[10, 100, 5000], bad=BAD)
def test_a_bad_row_is_nan_throughout_and_no_other_is(isa, log, classes, bad):
    members = make((9, classes), 3, torch.float32)
    members[1][4, classes // 2 if bad != -INF else slice(None)] = bad
    mean = torch.ops.fastfreeze.ensemble_softmax(members, None, 1.0, log)
    assert mean[4].isnan().all()
    assert not mean[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("log", [False, True], ids=["mean", "log"])
@pytest.mark.parametrize(
    ("weights", "temperature"), [(None, 1.0), ([3.0, 1.0], 0.5)], ids=["plain", "weighted, cold"]
)
def test_gradients(backend, device, weights, temperature, log):
    members = [
        torch.randn(1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
        for _ in range(2)
    ]

    def mean(*members):
        options = {"weights": weights, "temperature": temperature, "log": log}
        return ensemble_softmax(members, backend=backend, **options)

    assert torch.autograd.gradcheck(mean, members)
    assert torch.autograd.gradgradcheck(mean, members)


def test_gradients_of_logarithms_where_probabilities_underflow(backend, device):
    """Class 1 is masked for all and class 2 for the first member."""
    logits = [[[0.0, -INF, -INF]], [[0.0, -INF, -400.0]]]
    members = [torch.tensor(z, device=device, requires_grad=True) for z in logits]
    log = ensemble_softmax(members, log=True, backend=backend)
    log.backward(torch.ones_like(log))  # a masked class hands on nothing
    wide = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in logits]
    torch.stack([z[:, [0, 2]].log_softmax(-1) for z in wide]).logsumexp(0).sum().backward()
    for z, expected in zip(members, wide, strict=True):
        torch.testing.assert_close(z.grad.cpu().double(), expected.grad, rtol=1e-6, atol=1e-7)


@needs_cpu_kernels
def test_gradients_of_some_members_in_low_precision():
    members = [z.requires_grad_() for z in make((5, 40), 3, torch.bfloat16)]
    members[1].requires_grad_(False)
    weight = torch.randn(5, 40)
    (ensemble_softmax(members, backend="cpu").float() * weight).sum().backward()
    wide = [z.detach().double().requires_grad_() for z in members]
    (truth(wide) * weight.bfloat16().double()).sum().backward()
    assert members[1].grad is None
    for z, expected in zip(members[::2], wide[::2], strict=True):
        assert z.grad.dtype == torch.bfloat16
        torch.testing.assert_close(z.grad.double(), expected.grad, rtol=1e-2, atol=1e-4)


@covering("backend_and_device", backend_and_device=operators(), dtype=DTYPES, log=MEAN_AND_LOG)
def test_operators_are_registered_in_full(backend, device, log, dtype):
    prefix = "triton_" if backend == "triton" else ""
    mean = getattr(torch.ops.fastfreeze, f"{prefix}ensemble_softmax").default
    add = getattr(torch.ops.fastfreeze, f"{prefix}softmax_add").default
    members = [z.requires_grad_() for z in make((2, 3, 5), 3, dtype, device)]
    for weights in (None, [0.5, 0.25, 0.25]):
        torch.library.opcheck(mean, (members, weights, 2.0, log))
    logits = members[0].detach()
    out = torch.empty(logits.shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for total in (None, torch.rand_like(out)):
        for entropy in (None, torch.rand_like(out[..., 0])):
            torch.library.opcheck(add, (out, entropy, total, logits, 0.5, 2.0))


@needs_cpu_kernels
@pytest.mark.parametrize(
    "members",
    [
        [torch.rand(2, 3), torch.rand(2, 4)],
        [torch.rand(2, 3), torch.rand(2, 3).double()],
        [torch.ones(2, 3, dtype=torch.int64)],
        [torch.rand(2, 0)],
        [torch.rand(())],
    ],
    ids=["shape", "dtype", "integers", "no classes", "no dimension"],
)
def test_the_operator_itself_refuses_what_would_be_unsafe(members):
    with pytest.raises(RuntimeError, match="members must"):
        torch.ops.fastfreeze.ensemble_softmax(members, None, 1.0, False)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("weights", "temperature", "match"),
    [
        ([0.5], 1.0, "weights must be one for each of 2 members, got 1"),
        (None, 0.0, "temperature must be from"),
        (None, NAN, "temperature must be from"),
    ],
    ids=["weights", "zero", "nan"],
)
def test_the_operator_itself_refuses_options(weights, temperature, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.ensemble_softmax([torch.rand(2, 3)] * 2, weights, temperature, False)


UNSAFE_SUMS = {
    "shape": (torch.rand(2, 4), None, None, "result must have the shape"),
    "dtype": (torch.rand(2, 3).double(), None, None, "result must be float32"),
    "strides": (torch.rand(3, 2).t(), None, None, "result must be contiguous"),
    "total shape": (torch.rand(2, 3), None, torch.rand(3, 3), "total must have the shape"),
    "total dtype": (torch.rand(2, 3), None, torch.rand(2, 3).half(), "total must be float32"),
    "entropy shape": (torch.rand(2, 3), torch.rand(3), None, "entropy must have the shape"),
    "entropy dtype": (torch.rand(2, 3), torch.rand(2).half(), None, "entropy must be float32"),
    "entropy strides": (torch.rand(2, 3), torch.rand(4)[::2], None, "entropy must be contiguous"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("result", "entropy", "total", "match"), UNSAFE_SUMS.values(), ids=UNSAFE_SUMS
)
def test_the_adding_operator_refuses_what_would_be_unsafe(result, entropy, total, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.softmax_add(result, entropy, total, torch.rand(2, 3), 1.0, 1.0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("log", [False, True], ids=["mean", "log"])
def test_compiles_in_one_graph(backend, device, log, dynamic):
    torch.compiler.reset()
    options = {"weights": [1.0, 0.5, 0.5], "temperature": 2.0}
    compiled = torch.compile(
        lambda *members: ensemble_softmax(members, log=log, backend=backend, **options),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    expected = log_truth if log else truth
    members = [torch.randn(3, 8, device=device, requires_grad=True) for _ in range(3)]
    wide = [z.detach().double().requires_grad_() for z in members]
    mean = compiled(*members)
    mean_truth = expected(wide, **options)
    torch.testing.assert_close(mean.double(), mean_truth, rtol=1e-5, atol=1e-6)
    mean.square().sum().backward()
    mean_truth.square().sum().backward()
    torch.testing.assert_close(members[2].grad.double(), wide[2].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        members[0][1, 2] = NAN
        assert compiled(*members).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dim", [1, -3])
def test_classes_in_another_dimension(dim):
    members = [torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.randint(5, (2, 3, 4))
    expected = torch.stack(members).softmax(2).mean(0)
    assert torch.autograd.gradcheck(lambda *z: ensemble_softmax(z, dim=dim), members)
    torch.testing.assert_close(ensemble_softmax(torch.stack(members), dim=dim), expected)
    torch.testing.assert_close(ensemble_softmax(members, dim=dim, log=True), expected.log())
    average = EnsembleAverage(dim=dim, statistics=True)
    for z in members:
        average.update(z)
    torch.testing.assert_close(average.mean(), expected.detach())
    for found in (ensemble_statistics(members, labels, dim=dim), average.statistics(labels)):
        torch.testing.assert_close(found.probabilities, expected.detach())
        torch.testing.assert_close(found.argmax, expected.argmax(1))
        torch.testing.assert_close(found.nll, F.nll_loss(expected.log(), labels, reduction="none"))


REFUSED = {
    "empty list": ([], ValueError, "members must hold at least one member"),
    "no members": (torch.rand(0, 2, 3), ValueError, "members must hold at least one member"),
    "a member alone": (torch.rand(2, 3), ValueError, r"must have shape \[M, \.\.\., C\]"),
    "a generator": ((z for z in ()), TypeError, "must be a tensor, or a list or tuple"),
    "not tensors": ([[0.0, 1.0]], TypeError, r"members\[0\] must be a tensor, got list"),
    "not all tensors": ([torch.rand(2, 3), None], TypeError, r"members\[1\] must be a tensor"),
    "no batch": ([torch.rand(3)], ValueError, r"members\[0\] must have shape \[\.\.\., C\]"),
    "no classes": ([torch.rand(3, 0)], ValueError, r"C >= 2 classes, got shape \(3, 0\)"),
    "one logit": (torch.rand(2, 3, 1), ValueError, "softmax of one logit is 1, whatever it is"),
    "images": ([torch.rand(2, 3, 4, 5)], ValueError, r"dim must say .* \(2, 3, 4, 5\)"),
    "arrays": (np.ones((2, 2, 3)), TypeError, "members must .* got a NumPy array, .*from_numpy"),
    "an array": ([np.ones((2, 3))], TypeError, r"members\[0\] must .* NumPy array, .*from_numpy"),
    "integers": ([torch.ones(2, 3, dtype=torch.int64)], TypeError, "must be float16.*int64"),
    "sparse": ([torch.rand(2, 3).to_sparse()], TypeError, "must be a dense tensor"),
    "shapes": (
        [torch.rand(2, 3), torch.rand(3, 2)],
        ValueError,
        r"members\[1\] must be like members\[0\]: expected shape \(2, 3\).*got shape \(3, 2\)",
    ),
    "dtypes": (
        [torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3).half()],
        ValueError,
        r"members\[2\] must be like .*float32.*got .*float16",
    ),
    "devices": (
        [torch.rand(2, 3), torch.rand(2, 3, device="meta")],
        ValueError,
        r"members\[1\] must be like .*cpu.*got .*meta",
    ),
}


@pytest.mark.parametrize(("members", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_members(members, error, match):
    with pytest.raises(error, match=match):
        ensemble_softmax(members)


REFUSED_OPTIONS = {
    "not a list": ({"weights": 0.5}, TypeError, "weights must be a list or tuple, got float"),
    "too few": ({"weights": [1.0]}, ValueError, "one for each of 2 members, got 1"),
    "not numbers": ({"weights": [1.0, None]}, TypeError, r"weights\[1\] must be a number"),
    "negative": ({"weights": [2.0, -1.0]}, ValueError, r"weights\[1\] .*finite and >= 0, got -1"),
    "nan": ({"weights": [NAN, 1.0]}, ValueError, r"weights\[0\] must be finite"),
    "infinite": ({"weights": [1.0, INF]}, ValueError, r"weights\[1\] must be finite"),
    "all 0": ({"weights": [0.0, 0.0]}, ValueError, "weights must have a finite sum > 0"),
    "sum too large": ({"weights": [1e308, 1e308]}, ValueError, "a finite sum > 0"),
    "no number": ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
    "no such dimension": ({"dim": 2}, ValueError, "dim must be a dimension of .* got 2"),
    "no dimension": ({"dim": "C"}, TypeError, "dim must be an int or None, got 'C'"),
    "zero": ({"temperature": 0}, ValueError, "temperature must be from 1e-30 to 1e30, got 0"),
    "below zero": ({"temperature": -1.0}, ValueError, "temperature must be from"),
    "nan temperature": ({"temperature": NAN}, ValueError, "temperature must be from"),
    "infinite temperature": ({"temperature": INF}, ValueError, "temperature must be from"),
}


@pytest.mark.parametrize(
    ("options", "error", "match"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS
)
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        ensemble_softmax([torch.rand(2, 3)] * 2, **options)


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    members = make((2, 3), 2, torch.float32)
    if library.backends()["cpu"].available:
        with monkeypatch.context() as patch:
            patch.setattr(softmax, "ensemble_softmax_reference", unwanted)
            patch.setattr(softmax, "softmax_add_reference", unwanted)
            assert_near(ensemble_softmax(members), members)
            EnsembleAverage().update(members[0])
    missing = {**library.backends(), "cpu": library.Availability(False, "not built")}
    monkeypatch.setattr(library, "_BACKENDS", missing)
    assert_near(ensemble_softmax(members), members)
    EnsembleAverage().update(members[0])
    with pytest.raises(BackendUnavailableError, match="not built"):
        ensemble_softmax(members, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="not built"):
        EnsembleAverage(backend="cpu")


def test_an_explicit_backend_never_falls_back(monkeypatch):
    members = [torch.rand(2, 3, device="meta")]
    assert ensemble_softmax(members).is_meta
    can = {
        **library.backends(),
        **dict.fromkeys(("cpu", "triton", "cuda"), library.Availability(True, "")),
    }
    monkeypatch.setattr(library, "_BACKENDS", can)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot take members\[0\]: .* meta"):
        ensemble_softmax(members, backend="cpu")
    with pytest.raises(ValueError, match=r"backend='triton' cannot take members\[0\]: .* meta"):
        ensemble_softmax(members, backend="triton")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot take members\[0\]: .* cpu"):
        ensemble_softmax([torch.rand(2, 3)], backend="cuda")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot take logits: .* cpu"):
        EnsembleAverage(backend="cuda").update(torch.rand(2, 3))
    with pytest.raises(ValueError, match="backend must be one of"):
        ensemble_softmax(members, backend="tpu")


@pytest.mark.parametrize(
    ("backend", "members", "dtype", "most"),
    [
        ("cuda", (128, 2, 3), torch.float32, "128 members"),
        ("triton", (16, 2, 3), torch.float32, "16 members"),
        ("triton", (1, 2, 4096), torch.bfloat16, "4096 classes"),
        ("triton", (1, 2, 2048), torch.float64, "2048 classes"),
    ],
)
def test_what_a_launch_can_take(monkeypatch, backend, members, dtype, most):
    can = {**library.backends(), backend: library.Availability(True, "")}
    monkeypatch.setattr(library, "_BACKENDS", can)
    monkeypatch.setattr(library, "refuses_device", lambda *_: None)
    fitting = list(torch.empty(members, dtype=dtype))
    assert choose_backend(backend, "members[0]", fitting) == backend
    many = [*fitting, fitting[0]] if "members" in most else [torch.empty(2, members[-1] + 1)] * 1
    with pytest.raises(ValueError, match=f"at most {most.split()[0]} are possible"):
        choose_backend(backend, "members[0]", [z.to(dtype) for z in many])


def test_the_fastest_that_takes_it_is_chosen(monkeypatch):
    monkeypatch.setattr(library, "refuses_device", lambda *_: None)
    refused = {"cuda": "too many members", "triton": None}
    chosen = partial(library.choose, None, torch.device("cuda"), "members")
    assert chosen(lambda _: None) == "cuda"
    assert chosen(refused.get) == "triton"
    assert chosen(lambda _: "no") == "reference"
