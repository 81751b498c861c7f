"""Predictive statistics against fp64, over sizes, layouts and extreme logits; online averages."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from fastfreeze.kernels.softmax import EnsembleAverage, EnsembleStatistics, ensemble_statistics
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
    OPTIONS,
    assert_near,
    assert_probabilities_near,
    every_backend_case,
    every_kernel_case,
    log_truth,
    make,
    shares,
    skip_unless_taken,
    truth,
)

NAMES = [field.name for field in dataclasses.fields(EnsembleStatistics)]


def labels_of(members):
    classes = members[0].shape[-1]
    return torch.randint(0, classes, members[0].shape[:-1], device=members[0].device)


def true_statistics(members, labels=None, weights=None, temperature=1.0):
    mean = truth(members, weights, temperature)
    entropy = torch.special.entr(mean).sum(-1)
    own_entropies = sum(
        w * torch.special.entr((z.double() / temperature).softmax(-1)).sum(-1)
        for w, z in zip(shares(members, weights), members, strict=True)
    )
    nll = None
    if labels is not None:
        nll = -log_truth(members, weights, temperature).gather(-1, labels[..., None])[..., 0]
    return EnsembleStatistics(mean, *mean.max(-1), entropy, entropy - own_entropies, nll)


def assert_statistics_near(ours, expected, dtype):
    """All but probabilities are sums in float32 (float64) of terms of about 1."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6
    for name in NAMES:
        found, true = getattr(ours, name), getattr(expected, name)
        if true is None:
            assert found is None
            continue
        assert found.shape == true.shape, name
        assert found.is_contiguous(), name
        assert found.dtype == {"probabilities": dtype, "argmax": torch.int64}.get(name, wide), name
        if name in ("probabilities", "argmax"):
            continue
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=tolerance, msg=name)
    assert_probabilities_near(ours.probabilities, expected.probabilities)
    chosen = expected.probabilities.gather(-1, ours.argmax[..., None])[..., 0]
    torch.testing.assert_close(chosen, expected.max_probability, rtol=tolerance, atol=0)
    assert (ours.mutual_information >= 0).all()
    assert (ours.entropy >= 0).all()


def assert_backend_is_right(backend, device, shape, dtype, option):
    weights, temperature = option
    options = {"weights": weights, "temperature": temperature, "backend": backend}
    members = make(shape, 4, dtype, device)
    skip_unless_taken(backend, members)
    labels = labels_of(members)
    expected = true_statistics(members, labels, weights, temperature)
    ours = ensemble_statistics(members, labels, **options)
    assert ours.probabilities.device == members[0].device
    assert_statistics_near(ours, expected, dtype)
    stacked = ensemble_statistics(torch.stack(members), labels.int(), **options)
    assert all(torch.equal(getattr(ours, name), getattr(stacked, name)) for name in NAMES)


@every_kernel_case
def test_kernel_against_fp64(isa, dtype, shape, option):
    assert_backend_is_right("cpu", "cpu", shape, dtype, option)


@every_backend_case
def test_backends_against_fp64(backend, device, dtype, shape, option):
    assert_backend_is_right(backend, device, shape, dtype, option)


@covering("isa", isa=ISAS, dtype=[torch.float32, torch.bfloat16], count=COUNTS)
def test_any_number_of_members(isa, dtype, count):
    members, classes = count
    logits = make((5, classes), members, dtype)
    labels = labels_of(logits)
    ours = ensemble_statistics(logits, labels, backend="cpu")
    assert_statistics_near(ours, true_statistics(logits, labels), dtype)


def test_without_labels_there_is_no_nll(backend, device):
    for shape in [(5, 3), (5, 40), (1, 2100)]:
        members = make(shape, 3, torch.float32, device)
        ours = ensemble_statistics(members, backend=backend)
        assert_statistics_near(ours, true_statistics(members), torch.float32)


@covering("isa", isa=ISAS, dtype=DTYPES)
def test_entropy_of_equals_is_the_logarithm_of_how_many(isa, dtype):
    tolerance = 1e-14 if dtype == torch.float64 else 1.5e-6
    for classes in [*range(2, 35), 63, 64, 65, 1000, 2047, 2048, 2049, 4097, 50257]:
        logits = torch.full((2, classes), 3.0, dtype=dtype)
        entropy = ensemble_statistics([logits, logits], backend="cpu").entropy
        expected = torch.full((2,), math.log(classes), dtype=entropy.dtype)
        torch.testing.assert_close(entropy, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("classes", [2, 10, 16, 17, 40, 2048, 4000])
def test_the_first_of_equals_is_the_argmax(backend, device, classes):
    """Columns repeat, so that every mean has equals; the largest is each of five in turn."""
    kinds = min(5, classes)
    order = torch.randint(0, kinds, (classes,))
    order[torch.randperm(classes)[:kinds]] = torch.arange(kinds)
    base = torch.rand(2, kinds, kinds) + 2 * torch.eye(kinds)
    members = [z[:, order].to(device) for z in base]
    ours = ensemble_statistics(members, backend=backend)
    expected = [(order == kind).nonzero()[0].item() for kind in range(kinds)]
    assert ours.argmax.tolist() == expected


@needs_cpu_kernels
@pytest.mark.parametrize("classes", [7, 16, 33, 150, 2200])
def test_the_largest_is_found_wherever_it_is(isa, classes):
    ours = ensemble_statistics([torch.eye(classes).mul(2e4) - 1e4], backend="cpu")
    assert ours.argmax.tolist() == list(range(classes))
    assert (ours.max_probability == 1).all()
    assert (ours.entropy == 0).all()
    assert (ours.mutual_information == 0).all()


@covering(
    "backend_and_device", backend_and_device=kernels(), row=EXTREME_ROWS, copies=[1, 20, 1000]
)
def test_extreme_rows(backend, device, row, copies):
    logits = torch.tensor([row * copies] * 3, device=device)
    labels = torch.tensor([0, 1, 2], device=device)
    ours = ensemble_statistics([logits, logits], labels, backend=backend)
    expected = true_statistics([logits, logits], labels)
    for name in ("max_probability", "entropy", "nll"):
        found, true = getattr(ours, name), getattr(expected, name).float()
        torch.testing.assert_close(found, true, rtol=5e-6, atol=5e-6, msg=name)
    assert (ours.mutual_information <= 5e-6).all()


def test_members_that_contradict_each_other(backend, device):
    """All of the entropy is then disagreement, and all of a masked label's NLL is a weight's."""
    for classes in (3, 40, 4000):
        first, second = torch.full((2, 1, classes), -INF).unbind(0)
        first[:, 0], second[:, -1] = 700.0, -700.0
        members = [first.to(device), second.to(device)]
        ours = ensemble_statistics(
            members, torch.tensor([classes - 1], device=device), weights=[3, 1], backend=backend
        )
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        found = [ours.max_probability, ours.argmax, ours.entropy, ours.mutual_information, ours.nll]
        assert [t.item() for t in found] == pytest.approx(
            [0.75, 0, entropy, entropy, math.log(4)], rel=1e-6
        )


@pytest.mark.parametrize("classes", [3, 40, 4000])
def test_nll_of_a_label_that_underflows(backend, device, classes):
    logits = torch.zeros(2, classes)
    logits[:, 1] = torch.tensor([-500.0, -INF])
    members = [logits.to(device), logits.to(device)]
    labels = torch.tensor([1, 1], device=device)
    ours = ensemble_statistics(members, labels, backend=backend)
    assert (ours.probabilities[:, 1] == 0).all()
    assert ours.nll.tolist() == pytest.approx([500 + math.log(classes - 1), INF], rel=1e-6)


def poisoned_rows(members):
    """The same logits with NaN between the rows."""
    for z in members:
        wide = torch.full((z.shape[0], z.shape[1] + 7), NAN, dtype=z.dtype, device=z.device)
        wide[:, 3:-4] = z
        yield wide[:, 3:-4]


@pytest.mark.parametrize("classes", [5, 19, 2500])
def test_layouts(backend, device, classes):
    members = make((4, classes), 3, torch.float32, device)
    labels = torch.randint(0, classes, (4, 2), device=device)[:, 0]
    expected = ensemble_statistics(members, labels.contiguous(), backend=backend)
    for layout in (list(poisoned_rows(members)), [z.t().contiguous().t() for z in members]):
        ours = ensemble_statistics(layout, labels, backend=backend)
        for name in NAMES:
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name))


@needs_cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@covering("isa", isa=ISAS, dtype=DTYPES, classes=[2, 10, 17, 31, 33, 100, 2049])
def test_nothing_past_the_end_is_read_or_written(isa, classes, dtype):
    """A stray access ends the process."""
    rows = [guarded(z) for z in make((3, classes), 2, dtype)]
    labels = guarded(labels_of(rows))
    ours = ensemble_statistics(rows, labels, backend="cpu")
    assert_statistics_near(ours, true_statistics(rows, labels), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = guarded(torch.rand(3, classes, dtype=wide))
    entropy, out = guarded(torch.ones(3, dtype=wide)), guarded(torch.full_like(total, NAN))
    torch.ops.fastfreeze.softmax_add(out, entropy, total, rows[0], 0.5, 2.0)
    expected = true_statistics(rows[:1], temperature=2.0)
    sums = [out.double(), entropy.double()]
    true_sums = [total.double() + 0.5 * expected.probabilities, 1 + 0.5 * expected.entropy]
    torch.testing.assert_close(sums, true_sums, rtol=1e-6, atol=0)


@needs_cpu_kernels
@covering(shape=[(9001, 10), (2001, 50), (33, 4097)], dtype=[torch.float32, torch.float16])
def test_number_of_threads_changes_no_bit(shape, dtype):
    members = make(shape, 5, dtype)
    labels = labels_of(members)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ensemble_statistics(members, labels, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in NAMES:
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def operator_of(backend, name):
    prefix = "triton_" if backend == "triton" else ""
    return getattr(torch.ops.fastfreeze, prefix + name).default


@covering("backend_and_device", backend_and_device=operators(), classes=[10, 100, 5000], bad=BAD)
def test_a_bad_row_is_nan_throughout_and_no_other_is(backend, device, classes, bad):
    members = make((9, classes), 3, torch.float32, device)
    members[1][4, classes // 2 if bad != -INF else slice(None)] = bad
    labels = torch.zeros(9, dtype=torch.int64, device=device)
    results = operator_of(backend, "ensemble_statistics")(members, None, 1.0, labels)
    for name, result in zip(NAMES, results, strict=True):
        if name == "argmax":
            assert result[4] == 0
            continue
        assert result[4].isnan().all(), name
        assert not result[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any(), name


@covering("backend_and_device", backend_and_device=operators(), classes=[10, 100, 5000])
def test_a_label_that_is_no_class_gives_nan(backend, device, classes):
    members = make((4, classes), 2, torch.float32, device)
    labels = torch.tensor([0, -1, classes, 2**62], device=device)
    results = operator_of(backend, "ensemble_statistics")(members, None, 1.0, labels)
    assert results[-1].isnan().tolist() == [False, True, True, True]
    assert not any(result.isnan().any() for result in results[:-1])


@covering(
    "backend_and_device",
    backend_and_device=operators(),
    dtype=DTYPES,
    labelled={"no labels": False, "labels": True},
)
def test_operator_is_registered_in_full(backend, device, labelled, dtype):
    operator = operator_of(backend, "ensemble_statistics")
    members = make((2, 3, 5), 3, dtype, device)
    labels = labels_of(members) if labelled else None
    for weights in (None, [0.5, 0.25, 0.25]):
        torch.library.opcheck(operator, (members, weights, 2.0, labels))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(backend, device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda members, labels: ensemble_statistics(members, labels, backend=backend),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    members = [z.requires_grad_() for z in make((3, 8), 3, torch.float32, device)]
    labels = labels_of(members)
    ours = compiled(members, labels)
    assert not ours.probabilities.requires_grad
    detached = [z.detach() for z in members]
    assert_statistics_near(ours, true_statistics(detached, labels), torch.float32)


UNSAFE_LABELS = {
    "shape": (torch.zeros(3, dtype=torch.int64), "labels must have the shape"),
    "dtype": (torch.zeros(2, dtype=torch.int32), "labels must be int64"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("labels", "match"), UNSAFE_LABELS.values(), ids=UNSAFE_LABELS)
def test_the_operator_itself_refuses_what_would_be_unsafe(labels, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.ensemble_statistics([torch.rand(2, 3)], None, 1.0, labels)


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


def test_bad_arguments_are_refused_as_for_the_mean():
    logits = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"members\[1\] must be like"):
        ensemble_statistics([logits, logits.half()])
    with pytest.raises(ValueError, match="weights must be one for each of 2 members, got 1"):
        ensemble_statistics([logits, logits], weights=[1.0])
    with pytest.raises(ValueError, match="temperature must be from"):
        ensemble_statistics([logits], temperature=0.0)
    with pytest.raises(ValueError, match=r"members\[1\]\[0\] must be finite.*got nan"):
        ensemble_statistics([logits, torch.tensor([[0, NAN, 0], [0, 0, 0]])])


@covering("backend_and_device", backend_and_device=kernels(), dtype=DTYPES, classes=[10, 100, 2500])
def test_online_average(backend, device, classes, dtype):
    members = make((2, 3, classes), 5, dtype, device)
    skip_unless_taken(backend, members)
    average = EnsembleAverage(backend=backend)
    for m, logits in enumerate(members):
        average.update(logits)
        assert average.count == m + 1
        mean = average.mean()
        assert mean.dtype == dtype
        assert_near(mean, members[: m + 1])
        mean.fill_(NAN)  # what it hands out is not what it keeps


def test_online_average_with_weights_and_temperature(backend, device):
    members, weights = make((3, 40), 4, torch.float32, device), [3.0, 0, 0.5, 1]
    average = EnsembleAverage(temperature=0.5, backend=backend)
    for logits, weight in zip(members, weights, strict=True):
        average.update(logits, weight)
    assert_near(average.mean(), members, weights, 0.5)


def test_online_average_needs_a_member():
    average = EnsembleAverage()
    with pytest.raises(RuntimeError, match="mean of no members"):
        average.mean()
    average.update(torch.rand(2, 3), weight=0)
    with pytest.raises(RuntimeError, match="mean of no members"):
        average.mean()


@pytest.mark.parametrize("weight", [-1.0, NAN, INF], ids=str)
def test_online_average_refuses_a_weight(weight):
    average = EnsembleAverage()
    with pytest.raises(ValueError, match="weight must be finite and >= 0, got"):
        average.update(torch.rand(2, 3), weight)
    assert average.count == 0


def test_online_average_in_and_out_of_inference_mode(backend, device):
    members = make((2, 3), 3, torch.float32, device)
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
def test_a_refused_update_changes_nothing(backend, device, logits, error, match):
    if device.type != "cpu":
        pytest.skip("the values of a GPU's logits are not looked at")
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


@covering(
    "backend_and_device",
    backend_and_device=kernels(),
    dtype=DTYPES,
    classes=[10, 100, 2500],
    option=OPTIONS,
)
def test_online_statistics(backend, device, classes, dtype, option):
    weights, temperature = option
    members = make((2, 3, classes), 4, dtype, device)
    skip_unless_taken(backend, members)
    labels = labels_of(members)
    average = EnsembleAverage(temperature=temperature, statistics=True, backend=backend)
    for logits, weight in zip(members, weights or [1.0] * 4, strict=True):
        average.update(logits, weight)
    expected = true_statistics(members, labels, weights, temperature)
    assert_statistics_near(average.statistics(labels), expected, dtype)
    assert average.statistics().nll is None
    assert torch.equal(average.mean(), average.statistics().probabilities)


def test_online_nll_of_a_label_that_underflows():
    average = EnsembleAverage(statistics=True)
    average.update(torch.tensor([[0.0, -500.0]]))
    nll = average.statistics(torch.tensor([1])).nll
    assert nll.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


def test_online_statistics_must_be_asked_for():
    average = EnsembleAverage()
    average.update(torch.rand(2, 3))
    with pytest.raises(RuntimeError, match="statistics=True"):
        average.statistics()
    with pytest.raises(RuntimeError, match="mean of no members"):
        EnsembleAverage(statistics=True).statistics()


def test_a_refused_update_leaves_the_statistics(backend, device):
    if device.type != "cpu":
        pytest.skip("the values of a GPU's logits are not looked at")
    average = EnsembleAverage(statistics=True, backend=backend)
    average.update(torch.rand(2, 3))
    before = average.statistics()
    with pytest.raises(ValueError, match=r"logits\[1\] must be finite"):
        average.update(torch.tensor([[0, 1, 2], [0, NAN, 1]]))
    for name in NAMES[:-1]:
        assert torch.equal(getattr(average.statistics(), name), getattr(before, name))
