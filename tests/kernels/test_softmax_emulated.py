"""The CUDA softmax kernels, compiled for the CPU (emulation/), against fp64: not a GPU run."""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax import EnsembleStatistics
from tests.covering import covering
from tests.kernels.emulation import SANITIZERS, Addresses, build, dtype_code
from tests.kernels.softmax_cases import (
    DTYPES,
    INF,
    NAN,
    OPTIONS,
    TOLERANCE,
    assert_logs_near,
    assert_near,
    log_truth,
    make,
    shares,
    truth,
)
from tests.kernels.test_statistics import assert_statistics_near, true_statistics

SUM, LOG, STATISTICS = range(3)
# [classes, dtype]: the most that a kernel takes and one more, in whole vectors and not.
FEW = [1, 2, 10, 16, 17, 128, 129, 304, 512, 513, 1000, 1024, 1025, 2064]
SIZES = [(c, dtype) for c in FEW for dtype in DTYPES]
SIZES += [(c, torch.float64) for c in (6144, 6145)]
SIZES += [(c, dtype) for c in (12288, 12289, 12296) for dtype in (torch.float32, torch.bfloat16)]
# One for each kernel: 4 lanes to a row, 8, a warp, a block, a split row.
EACH_KERNEL = [10, 100, 999, 2001, 12289]

every_size = pytest.mark.parametrize(("classes", "dtype"), SIZES, ids=str)
each_kernel = pytest.mark.parametrize("classes", EACH_KERNEL)


@pytest.fixture(scope="module")
def plain():
    return build("softmax_harness.cpp", None)


def launch(program, mode, members, results, *, weights=None, temperature=1.0, blocks=10**6):
    """results: buffers 3 to 11 of the harness by name, `out` among them."""
    first = members[0]
    names = ["out", "before", "labels", "max_probability", "argmax", "entropy"]
    names += ["mutual_information", "nll", "entropy_sum"]
    assert set(results) <= set(names)
    assert all(z.stride(1) == 1 or z.shape[1] == 1 for z in members)
    addresses = Addresses(torch.tensor([z.data_ptr() for z in members]))
    strides = torch.tensor([z.stride(0) for z in members])
    weights = torch.tensor(shares(members, weights), dtype=torch.float64)
    out_is_sum = results["out"].dtype != first.dtype
    pointees = list({z.data_ptr(): z for z in members}.values())
    program.run(
        "softmax",
        [addresses, strides, weights, *(results.get(name) for name in names), *pointees],
        [dtype_code(first.dtype), mode, out_is_sum, *first.shape, blocks, 1 / temperature],
        seed=torch.randint(2**31, ()).item(),
    )


def poisoned(shape, dtype):
    return torch.full(shape, NAN, dtype=dtype)


def mean_of(program, members, mode=SUM, **options):
    out = poisoned(members[0].shape, members[0].dtype)
    launch(program, mode, members, {"out": out}, **options)
    return out


def statistics_of(program, members, labels=None, **options):
    rows, dtype = len(members[0]), members[0].dtype
    found = {"out": poisoned(members[0].shape, dtype)}
    found |= {"argmax": torch.full((rows,), -1)}
    for name in ("max_probability", "entropy", "mutual_information"):
        found[name] = poisoned((rows,), sum_dtype(dtype))
    if labels is not None:
        found["nll"] = poisoned((rows,), sum_dtype(dtype))
    launch(program, STATISTICS, members, {**found, "labels": labels}, **options)
    return EnsembleStatistics(probabilities=found.pop("out"), **{"nll": None, **found})


@every_size
def test_mean_logarithm_and_statistics(plain, classes, dtype):
    members = make((2 if classes > 2000 else 19, classes), 2, dtype)
    assert_near(mean_of(plain, members), members)
    assert_logs_near(mean_of(plain, members, LOG), log_truth(members))
    labels = torch.randint(classes, (len(members[0]),))
    found = statistics_of(plain, members, labels)
    assert_statistics_near(found, true_statistics(members, labels), dtype)


@each_kernel
def test_statistics_without_labels(plain, classes):
    members = make((3, classes), 2, torch.float32)
    assert_statistics_near(statistics_of(plain, members), true_statistics(members), torch.float32)


@covering(
    classes=EACH_KERNEL,
    dtype=DTYPES,
    with_total={"alone": False, "total": True},
    with_entropy={"plain": False, "entropy": True},
)
def test_adding(plain, classes, dtype, with_total, with_entropy):
    logits = make((3, classes), 1, dtype)
    wide = sum_dtype(dtype)
    tolerance = TOLERANCE[wide][0]
    total = torch.rand(3, classes, dtype=wide) if with_total else None
    entropy = torch.rand(3, dtype=wide)
    found = {"out": poisoned((3, classes), wide), "before": total}
    found |= {"entropy_sum": entropy.clone()} if with_entropy else {}
    launch(plain, STATISTICS if with_entropy else SUM, logits, found, temperature=1.5)
    p = truth(logits, temperature=1.5)
    expected = p if total is None else total.double() + p
    assert ((found["out"].double() - expected).abs() <= tolerance * expected).all()
    if with_entropy:
        expected = entropy.double() + torch.special.entr(p).sum(-1)
        assert ((found["entropy_sum"].double() - expected).abs() <= tolerance * expected).all()


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "plain"])
@each_kernel
def test_weights_and_temperature(plain, classes, option):
    weights, temperature = OPTIONS[option]
    members = make((2, classes), 4, torch.float32)
    options = {"weights": weights, "temperature": temperature}
    logs = mean_of(plain, members, LOG, **options)
    assert_logs_near(logs, log_truth(members, **options))
    labels = torch.randint(classes, (2,))
    found = statistics_of(plain, members, labels, **options)
    assert_statistics_near(found, true_statistics(members, labels, **options), torch.float32)


@pytest.mark.parametrize("count", [1, 128])
@each_kernel
def test_any_number_of_members(plain, classes, count):
    members = make((1, classes), count if classes < 2000 else min(count, 9), torch.float32)
    labels = torch.randint(classes, (1,))
    found = statistics_of(plain, members, labels)
    assert_statistics_near(found, true_statistics(members, labels), torch.float32)
    assert_logs_near(mean_of(plain, members, LOG), log_truth(members))


@pytest.mark.parametrize("mode", [SUM, STATISTICS])
@each_kernel
def test_fewer_blocks_than_work(plain, classes, mode):
    members = make((40 if classes < 2000 else 3, classes), 2, torch.float32)
    if mode == SUM:
        assert_near(mean_of(plain, members, blocks=2), members)
    else:
        found = statistics_of(plain, members, blocks=2)
        assert_statistics_near(found, true_statistics(members), torch.float32)


LAYOUTS = {
    "rows apart": lambda z: torch.nn.functional.pad(z, (8, 8), value=NAN)[:, 8:-8],
    "rows apart, unaligned": lambda z: torch.nn.functional.pad(z, (1, 2), value=NAN)[:, 1:-2],
    "every other row": lambda z: torch.stack([z, z * NAN], 1)[:, 0],
    "unaligned": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape),
    "one row for all": lambda z: z[:1].expand(z.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (10, torch.float16),
        (1000, torch.float32),
        (999, torch.float16),
        (2048, torch.bfloat16),
        (12304, torch.float32),
    ],
    ids=str,
)
def test_layouts(plain, classes, dtype, layout):
    members = [layout(z) for z in make((3, classes), 2, dtype)]
    assert_near(mean_of(plain, members), members)
    mixed = [members[0], members[1].contiguous()]
    assert_near(mean_of(plain, mixed), mixed)


def test_unaligned_output_and_total(plain):
    members = make((3, 1000), 1, torch.float32)
    out, total = poisoned((3001,), torch.float32), torch.rand(3001)
    found = {"out": out[1:].view(3, 1000), "before": total[1:].view(3, 1000)}
    launch(plain, SUM, members, found)
    assert out[0].isnan()
    expected = found["before"].double() + truth(members)
    torch.testing.assert_close(found["out"].double(), expected, rtol=4e-6, atol=0)


# Elements from a multiple of 16 bytes to the first member, the second, the output and what is added
# to; and from one row of a member to the next beside its classes.
OFFSETS = {
    "all even": ((0, 0), 0, 0, 0),
    "all alike": ((1, 1), 1, 1, 0),
    "members alike": ((3, 3), 0, 0, 0),
    "a member apart": ((2, 5), 2, 2, 0),
    "output apart": ((0, 0), 3, 0, 0),
    "total apart": ((5, 5), 5, 3, 0),
    "padded rows": ((7, 7), 1, 0, 3),
    "even rows": ((4, 4), 0, 0, None),
}
# Just below and above what a kernel takes, less a vector's worth: 128, 512, 1024, 12288 and a part.
EDGES = [129, 509, 1021, 2001, 12285, 12289, 18433]


def placed(values, offset, gap=0):
    """The same values at an offset from a multiple of 16 bytes, NaN around them; and all of it."""
    rows, columns = values.shape
    unit = 16 // values.element_size()
    width = columns + (-columns % unit if gap is None else gap)
    flat = poisoned((rows * width + 2 * unit,), values.dtype)
    start = (-flat.data_ptr() // values.element_size()) % unit + offset
    view = flat[start : start + rows * width].as_strided((rows, columns), (width, 1))
    return view.copy_(values), flat


@covering(offsets=OFFSETS, classes=EDGES, dtype=[torch.float32, torch.bfloat16])
def test_rows_between_vectors(plain, classes, dtype, offsets):
    (first, second), of_out, of_total, gap = offsets
    rows = 9 if classes < 2000 else 2
    logits = make((rows, classes), 2, dtype)
    members = [placed(z, o, gap)[0] for z, o in zip(logits, (first, second), strict=True)]
    out, around = placed(poisoned((rows, classes), dtype), of_out)
    labels = torch.randint(classes, (rows,))
    names = ("max_probability", "entropy", "mutual_information", "nll")
    found = {name: poisoned((rows,), torch.float32) for name in names}
    found |= {"out": out, "argmax": torch.full((rows,), -1)}
    launch(plain, STATISTICS, members, {**found, "labels": labels})
    outside = around.numel() - rows * classes
    assert around.isnan().sum() == outside
    ours = EnsembleStatistics(probabilities=found.pop("out"), **found)
    assert_statistics_near(ours, true_statistics(logits, labels), dtype)
    result, around = placed(poisoned((rows, classes), torch.float32), of_out % 4)
    total, _ = placed(torch.rand(rows, classes), of_total % 4)
    launch(plain, SUM, members[:1], {"out": result, "before": total})
    assert around.isnan().sum() == around.numel() - rows * classes
    expected = total.double() + truth(logits[:1])
    assert ((result.double() - expected).abs() <= TOLERANCE[torch.float32][0] * expected).all()


def test_sums_over_many_classes_stay_accurate(plain):
    members = [torch.rand(2, 50257) for _ in range(2)]  # nearly uniform: all terms count
    assert_near(mean_of(plain, members), members)


@pytest.mark.parametrize("mode", [SUM, LOG, STATISTICS])
@each_kernel
def test_masked_stretches(plain, classes, mode):
    """Of lanes, of warps, of whole parts of a split row; the same in every member, and not."""
    members = make((5, classes), 2, torch.float32)
    third = classes // 3
    members[0][0, :third] = members[1][0, :third] = -INF
    members[0][1, third:] = members[1][1, third:] = -INF
    members[0][2, :-1] = -INF
    members[1][3, 1:] = -INF
    if mode == LOG:
        assert_logs_near(mean_of(plain, members, LOG), log_truth(members))
    elif mode == SUM:
        assert_near(mean_of(plain, members), members)
    else:
        assert_statistics_near(
            statistics_of(plain, members), true_statistics(members), torch.float32
        )


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@each_kernel
def test_a_bad_row_is_nan_throughout_and_no_other_is(plain, classes, bad):
    members = make((3, classes), 2, torch.float32)
    members[1][1, classes // 2 if bad != -INF else slice(None)] = bad
    labels = torch.randint(classes, (3,))
    found = statistics_of(plain, members, labels)
    logs = mean_of(plain, members, LOG)
    assert found.argmax[1] == 0
    numbers = [found.max_probability, found.entropy, found.mutual_information, found.nll]
    for result in (logs, found.probabilities, *numbers):
        assert result[1].isnan().all()
        assert not result[::2].isnan().any()


@each_kernel
def test_the_first_of_equal_maxima(plain, classes):
    members = [torch.zeros(6, classes) for _ in range(2)]
    places = torch.randint(classes, (6, 3))
    places[0], places[1] = classes - 1, torch.tensor([0, 0, classes - 1])
    for z in members:
        z.scatter_(1, places[:-1], 5.0)  # in the last row all are equal
    found = statistics_of(plain, members).argmax
    assert found.tolist() == [*places[:-1].amin(1).tolist(), 0]


@each_kernel
def test_labels_that_are_no_class(plain, classes):
    members = make((4, classes), 2, torch.float32)
    found = statistics_of(plain, members, torch.tensor([-1, classes, classes - 1, -(2**62)]))
    assert found.nll.isnan().tolist() == [True, True, False, True]
    assert not found.probabilities.isnan().any()


@each_kernel
def test_what_underflows_has_a_logarithm(plain, classes):
    members = [torch.zeros(2, classes) for _ in range(2)]
    labels = torch.tensor([0, classes - 1])
    members[0][0, 0], members[1][0, 0] = -1000.0, -500.0
    members[0][1, -1], members[1][1, -1] = -INF, -3e4
    expected = -log_truth(members).gather(1, labels[:, None])[:, 0]
    for found in (
        statistics_of(plain, members, labels).nll,
        -mean_of(plain, members, LOG).gather(1, labels[:, None])[:, 0],
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
@covering(
    size={
        f"{classes}-{dtype}": (classes, dtype)
        for classes, dtype in [
            (10, torch.float16),
            (99, torch.float32),
            (512, torch.bfloat16),
            (1000, torch.float32),
            (1021, torch.float16),
            (2048, torch.float32),
            (2047, torch.float64),
            (12304, torch.bfloat16),
            (12289, torch.float32),
        ]
    },
    mode={"sum": SUM, "log": LOG, "statistics": STATISTICS},
    sanitizer=SANITIZERS[1:],
)
def test_touches_and_orders(sanitizer, mode, size):
    classes, dtype = size
    program = build("softmax_harness.cpp", sanitizer)
    members = make((5 if classes < 2000 else 2, classes), 2, dtype)
    if mode == STATISTICS:
        labels = torch.randint(classes, (len(members[0]),))
        found = statistics_of(program, members, labels, blocks=3)
        assert_statistics_near(found, true_statistics(members, labels), dtype)
    elif mode == LOG:
        assert_logs_near(mean_of(program, members, LOG, blocks=3), log_truth(members))
    else:
        assert_near(mean_of(program, members, blocks=3), members)
