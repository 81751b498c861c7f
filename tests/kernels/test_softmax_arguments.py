"""What the softmax operators and averages refuse, and which backend takes them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.kernels import library, softmax
from fastfreeze.kernels.softmax import EnsembleAverage, ensemble_softmax, ensemble_statistics
from fastfreeze.kernels.softmax_arguments import choose_backend
from tests.conftest import kernels, needs_cpu_kernels
from tests.covering import covering
from tests.kernels.softmax_cases import BAD, INF, NAMES, NAN, assert_near, make, truth

UNSAFE = {
    "shape": ([torch.rand(2, 3), torch.rand(2, 4)], None, 1.0, "members must"),
    "dtype": ([torch.rand(2, 3), torch.rand(2, 3).double()], None, 1.0, "members must"),
    "integers": ([torch.ones(2, 3, dtype=torch.int64)], None, 1.0, "members must"),
    "no classes": ([torch.rand(2, 0)], None, 1.0, "members must"),
    "no dimension": ([torch.rand(())], None, 1.0, "members must"),
    "weights": ([torch.rand(2, 3)] * 2, [0.5], 1.0, "weights must be one for each of 2 .*, got 1"),
    "zero": ([torch.rand(2, 3)], None, 0.0, "temperature must be from"),
    "nan": ([torch.rand(2, 3)], None, NAN, "temperature must be from"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("members", "weights", "temperature", "match"), UNSAFE.values(), ids=UNSAFE
)
def test_the_operator_itself_refuses_what_would_be_unsafe(members, weights, temperature, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.ensemble_softmax(members, weights, temperature, False)


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


UNSAFE_LABELS = {
    "shape": (torch.zeros(3, dtype=torch.int64), "labels must have the shape"),
    "dtype": (torch.zeros(2, dtype=torch.int32), "labels must be int64"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("labels", "match"), UNSAFE_LABELS.values(), ids=UNSAFE_LABELS)
def test_the_operator_itself_refuses_labels(labels, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.ensemble_statistics([torch.rand(2, 3)], None, 1.0, labels)


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


REFUSED_LABELS = {
    "a list": ([0, 1], TypeError, "labels must be a tensor of integers, got list"),
    "floats": (torch.rand(2), TypeError, "labels must be a tensor of integers, got torch.float32"),
    "bools": (torch.rand(2) > 0, TypeError, "labels must be a tensor of integers, got torch.bool"),
    "shape": (torch.tensor([0, 1, 2]), ValueError, r"labels must have shape \(2,\) .*got \(3,\)"),
    "device": (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "on cpu, .* on meta"),
    "negative": (torch.tensor([0, -1]), ValueError, r"labels\[1\] must be in 0\.\.2, got -1"),
    "too large": (torch.tensor([3, 0]), ValueError, r"labels\[0\] must be in 0\.\.2, got 3"),
}


@pytest.mark.parametrize(("labels", "error", "match"), REFUSED_LABELS.values(), ids=REFUSED_LABELS)
def test_refused_labels(labels, error, match):
    logits = torch.rand(2, 3)
    with pytest.raises(error, match=match):
        ensemble_statistics([logits], labels)
    average = EnsembleAverage(statistics=True)
    average.update(logits)
    with pytest.raises(error, match=match):
        average.statistics(labels)


def test_statistics_refuse_what_the_mean_does():
    logits = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"members\[1\] must be like"):
        ensemble_statistics([logits, logits.half()])
    with pytest.raises(ValueError, match="weights must be one for each of 2 members, got 1"):
        ensemble_statistics([logits, logits], weights=[1.0])
    with pytest.raises(ValueError, match="temperature must be from"):
        ensemble_statistics([logits], temperature=0.0)
    with pytest.raises(ValueError, match=r"members\[1\]\[0\] must be finite.*got nan"):
        ensemble_statistics([logits, torch.tensor([[0, NAN, 0], [0, 0, 0]])])


@covering("backend_and_device", backend_and_device=kernels(), log=[False, True], bad=BAD)
def test_a_bad_row_is_named(backend, device, log, bad):
    found = "-inf throughout" if bad == -INF else str(bad)
    members = make((2, 3, 100), 3, torch.float32, device)
    members[1][1, 2, 0 if bad != -INF else slice(None)] = bad
    if device.type != "cpu":  # to look would be to wait
        mean = ensemble_softmax(members, log=log, backend=backend)
        assert mean.isnan().all(-1).tolist() == [[False] * 3, [False, False, True]]
        assert mean.isnan().sum() == 100
        return
    message = rf"members\[1\]\[1, 2\] must be finite, or -inf for some classes, got {found}"
    with pytest.raises(ValueError, match=message):
        ensemble_softmax(members, log=log, backend=backend)


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch):
    def unwanted(*_):
        raise AssertionError("the reference ran")

    members = make((2, 3), 2, torch.float32)
    if library.backends()["cpu"].available:
        with monkeypatch.context() as patch:
            patch.setattr(softmax, "ensemble_softmax_reference", unwanted)
            patch.setattr(softmax, "softmax_add_reference", unwanted)
            assert_near(ensemble_softmax(members), truth(members))
            EnsembleAverage().update(members[0])
    missing = {**library.backends(), "cpu": library.Availability(False, "not built")}
    monkeypatch.setattr(library, "_BACKENDS", missing)
    assert_near(ensemble_softmax(members), truth(members))
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


# Averages of members that come one at a time.


def test_an_average_needs_a_member_and_statistics_to_be_asked_for():
    average = EnsembleAverage()
    for weight in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match="weight must be finite and >= 0, got"):
            average.update(torch.rand(2, 3), weight)
        assert average.count == 0
    with pytest.raises(RuntimeError, match="mean of no members"):
        average.mean()
    average.update(torch.rand(2, 3), weight=0)
    with pytest.raises(RuntimeError, match="mean of no members"):
        average.mean()
    with pytest.raises(RuntimeError, match="statistics=True"):
        average.statistics()
    with pytest.raises(RuntimeError, match="mean of no members"):
        EnsembleAverage(statistics=True).statistics()


def test_an_average_in_and_out_of_inference_mode(backend, device):
    members = make((2, 3), 3, torch.float32, device)
    average = EnsembleAverage(backend=backend)
    with torch.inference_mode():
        average.update(members[0])
    average.update(members[1].requires_grad_())
    average.update(members[2])
    mean = average.mean()
    assert not mean.requires_grad
    assert_near(mean, truth([z.detach() for z in members]))


REFUSED_UPDATES = {
    "shape": (torch.rand(3, 2), ValueError, r"expected shape \(2, 3\).*got shape \(3, 2\)"),
    "dtype": (torch.rand(2, 3).double(), ValueError, "expected .*float32.*got .*float64"),
    "device": (torch.rand(2, 3, device="meta"), ValueError, "expected .*cpu.*got .*meta"),
    "not a tensor": ([0.5], TypeError, "logits must be a tensor, got list"),
    "nan": (torch.tensor([[0, 1, 2], [0, NAN, 1]]), ValueError, r"logits\[1\] must be finite"),
    "masked": (torch.tensor([[-INF] * 3, [0.0] * 3]), ValueError, r"logits\[0\].*throughout"),
}


@pytest.mark.parametrize("refused", REFUSED_UPDATES.values(), ids=REFUSED_UPDATES)
def test_a_refused_update_changes_nothing(backend, device, refused):
    if device.type != "cpu":
        pytest.skip("the values of a GPU's logits are not looked at")
    logits, error, match = refused
    average, undisturbed = (EnsembleAverage(statistics=True, backend=backend) for _ in range(2))
    for m, good in enumerate(make((2, 3), 3, torch.float32)):
        if m:
            with pytest.raises(error, match=match):
                average.update(logits)
            ours, expected = average.statistics(), undisturbed.statistics()
            for name in NAMES[:-1]:
                assert torch.equal(getattr(ours, name), getattr(expected, name))
        average.update(good)
        undisturbed.update(good)
    assert average.count == 3
    assert torch.equal(average.mean(), undisturbed.mean())


def test_the_nll_of_a_label_that_underflows_in_an_average():
    average = EnsembleAverage(statistics=True)
    average.update(torch.tensor([[0.0, -500.0]]))
    nll = average.statistics(torch.tensor([1])).nll
    assert nll.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
