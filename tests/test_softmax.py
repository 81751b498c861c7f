"""The softmax kernels against fp64, over sizes, layouts and extreme logits; what they refuse."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import pytest
import torch

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.ops import _library, softmax
from fastfreeze.ops.softmax import EnsembleAverage, ensemble_softmax
from tests.conftest import needs_cpu_kernels

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Relative, and absolute for what underflows. 16-bit results are rounded once: half a unit.
TOLERANCE = {
    torch.float64: (1e-14, 0.0),
    torch.float32: (4e-6, 2e-45),
    torch.float16: (2.0**-11 * 1.01, 2.0**-25 * 1.01),
    torch.bfloat16: (2.0**-8 * 1.01, 0.0),
}
# [B, C]: a row to a lane up to 16 classes, groups of rows up to 2048, blocks above.
SHAPES = [(0, 10), (1, 1), (33, 2), (33, 10), (3, 16), (33, 17), (1, 31), (33, 32), (3, 33)]
SHAPES += [(33, 100), (3, 1000), (1, 2047), (3, 2048), (1, 2049), (3, 4097)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shape, members, dtype):
    return [torch.randn(shape, dtype=torch.float64).mul(4).to(dtype) for _ in range(members)]


def truth(members):
    return sum(z.double().softmax(-1) for z in members) / len(members)


def assert_near(ours, members):
    expected = truth(members)
    relative, absolute = TOLERANCE[ours.dtype]
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    error = (ours.double() - expected).abs() - absolute
    assert (error <= relative * expected).all(), (error / expected).max()


def guarded(tensor):
    """A copy whose last element ends where unreadable memory begins."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + room), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return flat.view(tensor.shape).copy_(tensor)


@needs_cpu_kernels
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_kernel_against_fp64(isa, dtype, shape):
    members = make(shape, 3, dtype)
    mean = ensemble_softmax(members, backend="cpu")
    assert mean.dtype == dtype
    assert_near(mean, members)


@every_dtype
def test_backends_against_fp64(backend, dtype):
    members = make((2, 3, 7), 4, dtype)
    mean = ensemble_softmax(members, backend=backend)
    assert mean.dtype == dtype
    assert_near(mean, members)
    assert torch.equal(ensemble_softmax(torch.stack(members), backend=backend), mean)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("members", "classes"), [(1, 40), (16, 40), (17, 40), (50, 10), (5, 2000)])
def test_any_number_of_members(isa, members, classes, dtype):
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
@pytest.mark.parametrize("classes", [5, 19, 2500])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, classes):
    members = [layout(4, classes) for _ in range(3)]
    for z in members:
        z.copy_(torch.randn(z.shape))
    mean = ensemble_softmax(members, backend="cpu")
    assert torch.equal(mean, ensemble_softmax([z.contiguous() for z in members], backend="cpu"))
    assert_near(mean, members)


@needs_cpu_kernels
def test_one_row_for_all():
    row = torch.randn(1, 40)
    mean = ensemble_softmax([row.expand(9, 40)] * 2, backend="cpu")
    assert_near(mean, [row.expand(9, 40)])


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@every_dtype
@pytest.mark.parametrize("classes", [1, 2, 10, 17, 31, 33, 100, 2049])
def test_nothing_past_the_end_is_read_or_written(isa, classes, dtype):
    """A stray access ends the process."""
    rows = [guarded(z) for z in make((3, classes), 2, dtype)]
    assert_near(ensemble_softmax(rows, backend="cpu"), rows)
    total_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    total = guarded(torch.rand(3, classes, dtype=total_dtype))
    out = guarded(torch.full_like(total, NAN))
    torch.ops.fastfreeze.softmax_add(out, total, rows[0])
    torch.testing.assert_close(out.double(), total.double() + truth(rows[:1]), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize(
    "row",
    [
        [1e4, -1e4, 9999.0],
        [88.0, 89.0, 90.0],
        [-90.0, -89.0, -88.0],
        [3e38, 3e38, -3e38],
        [0.0, -0.0, 0.0],
        [-INF, -500.0, -INF],
    ],
    ids=str,
)
@pytest.mark.parametrize("copies", [1, 20, 1000])
def test_extreme_rows(backend, row, copies):
    logits = torch.tensor([row * copies])
    assert_near(ensemble_softmax([logits], backend=backend), [logits])


@needs_cpu_kernels
@pytest.mark.parametrize("classes", [7, 16, 150, 2200])
def test_the_largest_is_found_wherever_it_is(isa, classes):
    logits = torch.eye(classes).mul(2e4) - 1e4
    assert torch.equal(ensemble_softmax([logits], backend="cpu"), torch.eye(classes))


@pytest.mark.parametrize("masked", [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)], ids=str)
def test_masked_stretch_of_a_long_row(backend, masked):
    logits = torch.randn(2, 5000) - 700.0
    logits[:, masked] = -INF
    mean = ensemble_softmax([logits], backend=backend)
    assert (mean[:, masked] == 0).all()
    assert_near(mean, [logits])


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9001, 10), (2001, 50), (33, 4097)], ids=str)
def test_number_of_threads_changes_no_bit(shape, dtype):
    members = make(shape, 5, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ensemble_softmax(members, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("classes", [10, 100, 5000])
@pytest.mark.parametrize(
    ("bad", "found"), [(NAN, "nan"), (INF, "inf"), (-INF, "-inf throughout")], ids=str
)
def test_a_bad_row_is_named(backend, classes, bad, found):
    members = make((4, 6, classes), 3, torch.float32)
    members[1][2, 3, 0 if bad != -INF else slice(None)] = bad
    message = rf"members\[1\]\[2, 3\] must be finite, or -inf for some classes, got {found}"
    with pytest.raises(ValueError, match=message):
        ensemble_softmax(members, backend=backend)


@needs_cpu_kernels
@pytest.mark.parametrize("classes", [10, 100, 5000])
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_bad_row_is_nan_throughout_and_no_other_is(isa, classes, bad):
    members = make((9, classes), 3, torch.float32)
    members[1][4, classes // 2 if bad != -INF else slice(None)] = bad
    mean = torch.ops.fastfreeze.ensemble_softmax(members)
    assert mean[4].isnan().all()
    assert not mean[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_gradients(backend):
    members = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def mean(*members):
        return ensemble_softmax(members, backend=backend)

    assert torch.autograd.gradcheck(mean, members)
    assert torch.autograd.gradgradcheck(mean, members)


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


@needs_cpu_kernels
@every_dtype
def test_operators_are_registered_in_full(dtype):
    members = [z.requires_grad_() for z in make((2, 3, 5), 3, dtype)]
    torch.library.opcheck(torch.ops.fastfreeze.ensemble_softmax.default, (members,))
    out = torch.empty(2, 3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for total in (None, torch.rand_like(out)):
        torch.library.opcheck(
            torch.ops.fastfreeze.softmax_add.default, (out, total, members[0].detach())
        )


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
        torch.ops.fastfreeze.ensemble_softmax(members)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("result", "total", "match"),
    [
        (torch.rand(2, 4), None, "result must have the shape"),
        (torch.rand(2, 3).double(), None, "result must be float32"),
        (torch.rand(3, 2).t(), None, "result must be contiguous"),
        (torch.rand(2, 3), torch.rand(3, 3), "total must have the shape"),
        (torch.rand(2, 3), torch.rand(2, 3).half(), "total must be float32"),
    ],
    ids=["shape", "dtype", "strides", "total shape", "total dtype"],
)
def test_the_adding_operator_refuses_what_would_be_unsafe(result, total, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.softmax_add(result, total, torch.rand(2, 3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(backend, dynamic):
    compiled = torch.compile(
        lambda *members: ensemble_softmax(members, backend=backend),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    members = [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
    mean = compiled(*members)
    assert_near(mean.detach(), [z.detach() for z in members])
    mean.square().sum().backward()
    wide = [z.detach().double().requires_grad_() for z in members]
    truth(wide).square().sum().backward()
    torch.testing.assert_close(members[2].grad.double(), wide[2].grad, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        members[0][1, 2] = NAN
        assert compiled(*members).isnan().any(-1).tolist() == [False, True, False]


REFUSED = {
    "empty list": ([], ValueError, "members must hold at least one member"),
    "no members": (torch.rand(0, 2, 3), ValueError, "members must hold at least one member"),
    "a member alone": (torch.rand(2, 3), ValueError, r"must have shape \[M, \.\.\., C\]"),
    "a generator": ((z for z in ()), TypeError, "must be a tensor, or a list or tuple"),
    "not tensors": ([[0.0, 1.0]], TypeError, r"members\[0\] must be a tensor, got list"),
    "not all tensors": ([torch.rand(2, 3), None], TypeError, r"members\[1\] must be a tensor"),
    "no batch": ([torch.rand(3)], ValueError, r"members\[0\] must have shape \[\.\.\., C\]"),
    "no classes": ([torch.rand(3, 0)], ValueError, "C >= 1"),
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


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    members = make((2, 3), 2, torch.float32)
    if _library.backends()["cpu"].available:
        with monkeypatch.context() as patch:
            patch.setattr(softmax, "ensemble_softmax_reference", unwanted)
            patch.setattr(softmax, "softmax_add_reference", unwanted)
            assert_near(ensemble_softmax(members), members)
            EnsembleAverage().update(members[0])
    missing = {**_library.backends(), "cpu": _library.Availability(False, "not built")}
    monkeypatch.setattr(_library, "_BACKENDS", missing)
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
        **_library.backends(),
        **dict.fromkeys(("cpu", "triton"), _library.Availability(True, "")),
    }
    monkeypatch.setattr(_library, "_BACKENDS", can)
    with pytest.raises(ValueError, match="backend='cpu' cannot take members: on meta"):
        ensemble_softmax(members, backend="cpu")
    with pytest.raises(ValueError, match="backend='triton' has no ensemble softmax"):
        ensemble_softmax(members, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        ensemble_softmax(members, backend="tpu")


@every_dtype
@pytest.mark.parametrize("classes", [10, 100, 2500])
def test_online_average(backend, classes, dtype):
    members = make((2, 3, classes), 5, dtype)
    average = EnsembleAverage(backend=backend)
    for m, logits in enumerate(members):
        average.update(logits)
        assert average.count == m + 1
        mean = average.mean()
        assert mean.dtype == dtype
        assert_near(mean, members[: m + 1])
        mean.fill_(NAN)  # what it hands out is not what it keeps


def test_online_average_needs_a_member():
    with pytest.raises(RuntimeError, match="mean of no members"):
        EnsembleAverage().mean()


def test_online_average_in_and_out_of_inference_mode(backend):
    members = make((2, 3), 3, torch.float32)
    average = EnsembleAverage(backend=backend)
    with torch.inference_mode():
        average.update(members[0])
    average.update(members[1].requires_grad_())
    average.update(members[2])
    mean = average.mean()
    assert not mean.requires_grad
    assert_near(mean, [z.detach() for z in members])


REFUSED_UPDATES = {
    "shape": (torch.rand(3, 2), ValueError, r"expected shape \(2, 3\).*got shape \(3, 2\)"),
    "dtype": (torch.rand(2, 3).double(), ValueError, "expected .*float32.*got .*float64"),
    "device": (torch.rand(2, 3, device="meta"), ValueError, "expected .*cpu.*got .*meta"),
    "not a tensor": ([0.5], TypeError, "logits must be a tensor, got list"),
    "nan": (torch.tensor([[0, 1, 2], [0, NAN, 1]]), ValueError, r"logits\[1\] must be finite"),
    "masked": (torch.tensor([[-INF] * 3, [0.0] * 3]), ValueError, r"logits\[0\].*throughout"),
}


@pytest.mark.parametrize(
    ("logits", "error", "match"), REFUSED_UPDATES.values(), ids=REFUSED_UPDATES
)
def test_a_refused_update_changes_nothing(backend, logits, error, match):
    members = make((2, 3), 3, torch.float32)
    average, undisturbed = EnsembleAverage(backend=backend), EnsembleAverage(backend=backend)
    for m, good in enumerate(members):
        if m:
            with pytest.raises(error, match=match):
                average.update(logits)
            assert torch.equal(average.mean(), undisturbed.mean())
        average.update(good)
        undisturbed.update(good)
    assert average.count == 3
    assert torch.equal(average.mean(), undisturbed.mean())
