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

Z = torch.rand(2, 3)


def of_softmax(members, weights=None, temperature=1.0):
    return lambda ops: ops.ensemble_softmax(members, weights, temperature, False)


def of_sum(result=Z, entropy=None, total=None):
    return lambda ops: ops.softmax_add(result, entropy, total, Z, 1.0, 1.0)


def of_labels(labels):
    return lambda ops: ops.ensemble_statistics([Z], None, 1.0, labels)


UNSAFE = {
    "shape": (of_softmax([Z, torch.rand(2, 4)]), "members must"),
    "dtype": (of_softmax([Z, Z.double()]), "members must"),
    "integers": (of_softmax([Z.long()]), "members must"),
    "no classes": (of_softmax([Z[:, :0]]), "members must"),
    "no dimension": (of_softmax([torch.rand(())]), "members must"),
    "weights": (of_softmax([Z, Z], [0.5]), "weights must be one for each of 2 .*, got 1"),
    "temperature 0": (of_softmax([Z], None, 0.0), "temperature must be from"),
    "temperature nan": (of_softmax([Z], None, NAN), "temperature must be from"),
    "result's shape": (of_sum(torch.rand(2, 4)), "result must have the shape"),
    "result's dtype": (of_sum(Z.double()), "result must be float32"),
    "result's strides": (of_sum(torch.rand(3, 2).t()), "result must be contiguous"),
    "total's shape": (of_sum(total=torch.rand(3, 3)), "total must have the shape"),
    "total's dtype": (of_sum(total=Z.half()), "total must be float32"),
    "entropy's shape": (of_sum(entropy=torch.rand(3)), "entropy must have the shape"),
    "entropy's dtype": (of_sum(entropy=Z[:, 0].half()), "entropy must be float32"),
    "entropy's strides": (of_sum(entropy=torch.rand(4)[::2]), "entropy must be contiguous"),
    "labels' shape": (of_labels(torch.zeros(3, dtype=torch.int64)), "labels must have the shape"),
    "labels' dtype": (of_labels(torch.zeros(2, dtype=torch.int32)), "labels must be int64"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("call", "match"), UNSAFE.values(), ids=UNSAFE)
def test_the_operators_themselves_refuse_what_would_be_unsafe(call, match):
    with pytest.raises(RuntimeError, match=match):
        call(torch.ops.fastfreeze)


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


WHY_NO_CLASSES = r"C >= 2 classes, got shape \(3, 0\)"
REFUSED = {
    "empty list": ({"members": []}, ValueError, "members must hold at least one member"),
    "no members": ({"members": Z[:0, :, None]}, ValueError, "must hold at least one member"),
    "a member alone": ({"members": Z}, ValueError, r"must have shape \[M, \.\.\., C\]"),
    "a generator": (
        {"members": (z for z in ())},
        TypeError,
        "must be a tensor, or a list or tuple",
    ),
    "not tensors": ({"members": [[0.0]]}, TypeError, r"members\[0\] must be a tensor, got list"),
    "not all": ({"members": [Z, None]}, TypeError, r"members\[1\] must be a tensor"),
    "no batch": ({"members": [Z[0]]}, ValueError, r"members\[0\] must have shape \[\.\.\., C\]"),
    "no classes": ({"members": [torch.rand(3, 0)]}, ValueError, WHY_NO_CLASSES),
    "one logit": ({"members": Z[..., None]}, ValueError, "softmax of one logit is 1, whatever"),
    "images": (
        {"members": [torch.rand(2, 3, 4, 5)]},
        ValueError,
        r"dim must say .* \(2, 3, 4, 5\)",
    ),
    "arrays": ({"members": np.ones((2, 2, 3))}, TypeError, "got a NumPy array, .*from_numpy"),
    "an array": ({"members": [np.ones((2, 3))]}, TypeError, r"members\[0\] must .* NumPy array"),
    "integers": ({"members": [Z.long()]}, TypeError, "must be float16.*int64"),
    "sparse": ({"members": [Z.to_sparse()]}, TypeError, "must be a dense tensor"),
    "shapes": (
        {"members": [Z, Z.t()]},
        ValueError,
        r"members\[1\] must be like members\[0\]: expected shape \(2, 3\).*got shape \(3, 2\)",
    ),
    "dtypes": (
        {"members": [Z, Z, Z.half()]},
        ValueError,
        r"\[2\] must be like .*32.*got .*float16",
    ),
    "devices": (
        {"members": [Z, Z.to("meta")]},
        ValueError,
        r"\[1\] must be like .*cpu.*got .*meta",
    ),
    "nan": ({"members": [Z, Z + NAN]}, ValueError, r"members\[1\]\[0\] must be finite.*got nan"),
    "weights": ({"weights": 0.5}, TypeError, "weights must be a list or tuple, got float"),
    "too few": ({"weights": [1.0]}, ValueError, "one for each of 2 members, got 1"),
    "not numbers": ({"weights": [1.0, None]}, TypeError, r"weights\[1\] must be a number"),
    "negative": ({"weights": [2.0, -1.0]}, ValueError, r"weights\[1\] .*finite and >= 0, got -1"),
    "weight nan": ({"weights": [NAN, 1.0]}, ValueError, r"weights\[0\] must be finite"),
    "all 0": ({"weights": [0.0, 0.0]}, ValueError, "weights must have a finite sum > 0"),
    "sum too large": ({"weights": [1e308, 1e308]}, ValueError, "a finite sum > 0"),
    "no number": ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
    "zero": ({"temperature": 0}, ValueError, "temperature must be from 1e-30 to 1e30, got 0"),
    "temperature nan": ({"temperature": NAN}, ValueError, "temperature must be from"),
    "no such dimension": ({"dim": 2}, ValueError, r"dim must be in -2\.\.1, got 2"),
    "no dimension": ({"dim": "C"}, TypeError, r"dim must be an int in -2\.\.1, got 'C'"),
}


@pytest.mark.parametrize(("given", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_members_and_options(given, error, match):
    for function in (ensemble_softmax, ensemble_statistics):
        with pytest.raises(error, match=match):
            function(**{"members": [Z, Z], **given})


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
    with pytest.raises(error, match=match):
        ensemble_statistics([Z], labels)
    average = EnsembleAverage(statistics=True)
    average.update(Z)
    with pytest.raises(error, match=match):
        average.statistics(labels)


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
    meta = [Z.to("meta")]
    assert ensemble_softmax(meta).is_meta
    can = dict.fromkeys(("cpu", "triton", "cuda"), library.Availability(True, ""))
    monkeypatch.setattr(library, "_BACKENDS", {**library.backends(), **can})
    for backend, members in [("cpu", meta), ("triton", meta), ("cuda", [Z])]:
        device = members[0].device
        message = rf"backend='{backend}' cannot take members\[0\]: .* {device}"
        with pytest.raises(ValueError, match=message):
            ensemble_softmax(members, backend=backend)
        with pytest.raises(
            ValueError, match=f"backend='{backend}' cannot take logits: .* {device}"
        ):
            EnsembleAverage(backend=backend).update(members[0])
    with pytest.raises(ValueError, match="backend must be one of"):
        ensemble_softmax(meta, backend="tpu")


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
    wider = [torch.empty(2, members[-1] + 1, dtype=dtype)]
    many = [*fitting, fitting[0]] if "members" in most else wider
    with pytest.raises(ValueError, match=f"at most {most.split()[0]} are possible"):
        choose_backend(backend, "members[0]", many)
    # And the fastest that takes it is chosen.
    refused = {"cuda": "too many members", "triton": None}
    chosen = partial(library.choose, None, torch.device("cuda"), "members")
    assert chosen(lambda _: None) == "cuda"
    assert chosen(refused.get) == "triton"
    assert chosen(lambda _: "no") == "reference"


def test_an_average_needs_a_member_and_statistics_to_be_asked_for():
    average = EnsembleAverage()
    for weight in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match="weight must be finite and >= 0, got"):
            average.update(Z, weight)
    for weight in (None, 0):
        if weight is not None:
            average.update(Z, weight)
        assert average.count == int(weight is not None)
        with pytest.raises(RuntimeError, match="mean of no members"):
            average.mean()
    with pytest.raises(RuntimeError, match="statistics=True"):
        average.statistics()
    with pytest.raises(RuntimeError, match="mean of no members"):
        EnsembleAverage(statistics=True).statistics()
    average = EnsembleAverage(statistics=True)
    average.update(torch.tensor([[0.0, -500.0]]))
    nll = average.statistics(torch.tensor([1])).nll  # of what underflows
    assert nll.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


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
    "shape": (Z.t(), ValueError, r"expected shape \(2, 3\).*got shape \(3, 2\)"),
    "dtype": (Z.double(), ValueError, "expected .*float32.*got .*float64"),
    "device": (Z.to("meta"), ValueError, "expected .*cpu.*got .*meta"),
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
    for good in make((2, 3), 3, torch.float32):
        average.update(good)
        undisturbed.update(good)
        with pytest.raises(error, match=match):
            average.update(logits)
        ours, expected = average.statistics(), undisturbed.statistics()
        for name in NAMES[:-1]:
            assert torch.equal(getattr(ours, name), getattr(expected, name))
    assert average.count == 3
