"""The softmax operators against fp64, in every way to compute them; what is built on them.

CUDA's kernels are emulated where there is no GPU, and Triton's run in its interpreter.
"""

from __future__ import annotations

import sys

import pytest
import torch

from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax import (
    EnsembleAverage,
    EnsembleStatistics,
    ensemble_softmax,
    ensemble_statistics,
)
from tests.conftest import HAS_GPU, kernels, needs_cpu_kernels, operators
from tests.covering import covering
from tests.kernels.guard import SIDES, by_threads, guarded
from tests.kernels.softmax_cases import (
    BAD,
    COUNTS,
    CPU,
    DTYPES,
    INF,
    KERNELS,
    NAMES,
    NAN,
    OPTIONS,
    SHAPES,
    TRITON,
    WAYS,
    assert_adds,
    assert_logs_near,
    assert_near,
    assert_right,
    assert_statistics_near,
    by_ways,
    labels_of,
    log_truth,
    make,
    shares,
    statistics_by,
    true_statistics,
    truth,
)

EVERY_SHAPE = {"x".join(map(str, shape)): shape for shape in SHAPES}
OF_TRITON = {name: shape for name, shape in EVERY_SHAPE.items() if shape[-1] <= 2049}
OF_TRITON |= {"1x1": (1, 1), "2x80": (2, 80), "17x64": (17, 64), "2x4096": (2, 4096)}
# One for each kernel: 4 lanes to a row, 8, a warp, a block, a split row, which is not for Triton.
EACH_KERNEL = [10, 100, 999, 2001, 12289]


@by_ways(
    WAYS,
    {"shape": OF_TRITON, "count": [1, 2, 3, 9, 16]},
    shape=EVERY_SHAPE,
    dtype=DTYPES,
    option=OPTIONS,
    count=COUNTS,
)
def test_against_fp64(way, shape, dtype, option, count):
    operators, device = way
    count = min(count, 3) if shape[-1] > 33 else count
    weights, temperature = option[0](count), option[1]
    assert_right(operators, make(shape, count, dtype, device), None, weights, temperature)


def tiled(classes, *rows):
    """Two members of these rows, again and again, as far as there are classes."""
    logits = torch.tensor(rows).repeat(1, -(-classes // len(rows[0])))[:, :classes]
    return [logits, logits.clone()]


def masked_stretches(classes):
    """Of lanes, of warps, of whole parts of a split row; the same in every member, and not."""
    members = [z - 700 for z in make((5, classes), 2, torch.float32)]
    third = classes // 3
    members[0][0, :third] = members[1][0, :third] = -INF
    members[0][1, third:] = members[1][1, third:] = -INF
    members[0][2, :-1] = -INF
    members[1][3, 1:] = -INF
    return members


def underflowing(classes):
    """What is 0 as a probability has a logarithm: in both members, in one, in none."""
    members = [torch.zeros(4, classes) for _ in range(2)]
    members[0][0, 0], members[1][0, 0] = -1000.0, -500.0
    members[0][1, 0], members[1][1, 0] = -INF, -3e4
    members[0][2, 0] = members[1][2, 0] = -INF
    members[0][3, 0] = -200.0
    return members


def contradicting(classes):
    """All of the entropy is then disagreement."""
    first, second = torch.full((2, 1, classes), -INF).unbind(0)
    first[:, 0], second[:, -1] = 700.0, -700.0
    return [first, second]


def from_the_largest_to_the_smallest(classes):
    gaps = torch.cat([torch.linspace(0, 200, 8), torch.tensor([87.3, 103.9, 700.0, 1e30, 3e38])])
    logits = torch.full((len(gaps), classes), -INF)
    logits[:, -1], logits[:, 0] = -gaps, 0.0
    return [logits, logits]


CONTENTS = {
    "extreme": lambda classes: tiled(
        classes,
        [1e4, -1e4, 9999.0],
        [88.0, 89.0, 90.0],
        [-90.0, -89.0, -88.0],
        [3e38, 3e38, -3e38],
        [0.0, -0.0, 0.0],
        [-INF, -500.0, -INF],
        [0.0, -103.5, -120.0],
    ),
    "masked": masked_stretches,
    "underflowing": underflowing,
    "contradicting": contradicting,
    "gaps": from_the_largest_to_the_smallest,
    "nearly uniform": lambda classes: [torch.rand(2, classes) for _ in range(2)],
    "equal": lambda classes: [torch.full((2, classes), 3.0)] * 2,
}


@by_ways(WAYS, {"classes": EACH_KERNEL[:-1]}, content=CONTENTS, classes=EACH_KERNEL)
def test_extreme_rows(way, content, classes):
    operators, device = way
    members = [z.to(device) for z in content(classes)]
    # A label's logarithm may be 1000: what is near 0 beside it is not told apart.
    labels = torch.zeros(len(members[0]), dtype=torch.int64, device=device)
    weights = [3.0, 1.0] if content is contradicting else None
    mean = operators.ensemble_softmax(members, shares(members, weights), 1.0, False)
    assert_near(mean, truth(members, weights))
    log = operators.ensemble_softmax(members, shares(members, weights), 1.0, True)
    logs = log_truth(members, weights)
    assert_logs_near(log, logs.where(logs.float() != -INF, -INF))  # of fp32
    ours = statistics_by(operators, members, labels, shares(members, weights))
    assert_statistics_near(ours, true_statistics(members, labels, weights), torch.float32)


@by_ways(WAYS, {"classes": [2, *EACH_KERNEL[:-1]]}, classes=[2, *EACH_KERNEL])
def test_the_first_of_equals_is_the_argmax(way, classes):
    """Columns repeat, so that every mean has equals; the largest is each of five in turn."""
    operators, device = way
    kinds = min(5, classes)
    order = torch.randint(0, kinds, (classes,))
    order[torch.randperm(classes)[:kinds]] = torch.arange(kinds)
    base = torch.rand(2, kinds, kinds) + 2 * torch.eye(kinds)
    members = [z[:, order].to(device) for z in base]
    expected = [(order == kind).nonzero()[0].item() for kind in range(kinds)]
    assert statistics_by(operators, members).argmax.tolist() == expected


@pytest.mark.parametrize("way", CPU, indirect=True)
def test_exponentials_and_logarithms_over_their_range(way):
    for classes in (2, 40, 2100):
        gaps = torch.cat([torch.linspace(0, 200, 3001), torch.tensor([87.4, 105, 1e4, 3e38])])
        logits = torch.full((len(gaps), classes), -INF)
        logits[:, -1], logits[:, 0] = -gaps, 0.0
        mean = way[0].ensemble_softmax([logits], None, 1.0, False)
        expected = logits.double().softmax(-1)
        assert ((mean.double() - expected).abs() <= 3e-7 * expected + 1.5e-45).all()
        log = way[0].ensemble_softmax([logits, logits], None, 1.0, True)
        assert_logs_near(log, log_truth([logits]))


@by_ways(WAYS, {}, classes=[3, 40, 2100])
def test_extreme_temperatures(way, classes):
    """Near 0 only the largest counts, and far above all do alike, but for masked ones."""
    operators, device = way
    logits = torch.randn(2, classes).mul(1e3)
    logits[:, 0], logits[:, 1] = 1e4, -INF
    coldest = torch.tensor([1.0] + [0.0] * (classes - 1)).expand(2, -1)
    hottest = torch.full((2, classes), 1 / (classes - 1))
    hottest[:, 1] = 0
    for temperature, scale, expected in [(1e-30, 3e34, coldest), (1e30, 1.0, hottest)]:
        mean = operators.ensemble_softmax([logits.mul(scale).to(device)], None, temperature, False)
        torch.testing.assert_close(mean.cpu(), expected, rtol=1e-6, atol=0)


def nans(*shape):
    return torch.full(shape, NAN)


def filled(z):
    own = z[:1] if z.stride(0) == 0 else z  # one row for all
    own.copy_(torch.randn(own.shape))
    return z


LAYOUTS = {
    "rows apart": lambda b, c: nans(b, c + 7)[:, 3 : 3 + c],
    "rows apart by vectors": lambda b, c: nans(b, c + 8)[:, 4 : 4 + c],
    "every other row": lambda b, c: nans(2 * b, c)[::2],
    "one row for all": lambda b, c: nans(1, c).expand(b, c),
    "unaligned": lambda b, c: nans(b * c + 3)[1 : 1 + b * c].view(b, c),
    "transposed": lambda b, c: nans(c, b).t(),
    "every other class": lambda b, c: nans(b, 2 * c)[:, ::2],
    "channels last": lambda b, c: (
        nans(2, c, 3, b).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "channels first": lambda b, c: nans(2, c, 3, b).permute(0, 2, 3, 1),
    "batch transposed": lambda b, c: nans(3, b, c).transpose(0, 1),
    "batch sliced": lambda b, c: nans(3, b + 1, c)[:, :b],
}


@by_ways(KERNELS, {"classes": [1, 32]}, layout=LAYOUTS, classes=[5, 32, 999])
def test_layouts(way, layout, classes):
    operators, device = way
    with torch.device(device):
        members = [filled(layout(4, classes)) for _ in range(2)]
    members.append(torch.randn(members[0].shape, device=device))
    labels = torch.stack([labels_of(members)] * 2, -1)[..., 0]
    assert_right(operators, members, labels)


@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
@by_ways(
    CPU, {"classes": [10, 33]}, dtype=DTYPES, classes=[2, 10, 17, 31, 33, 100, 2049], side=SIDES
)
def test_nothing_beside_the_tensors_is_read_or_written(way, dtype, classes, side):
    """A stray access ends the process."""
    operators, device = way
    if device != "cpu":
        pytest.skip("guards memory of the CPU")
    members = [guarded(z, side) for z in make((3, classes), 2, dtype)]
    assert_right(operators, members, guarded(labels_of(members), side))
    wide = sum_dtype(dtype)
    sums = [guarded(torch.rand(shape, dtype=wide), side) for shape in [(3, classes), (3,)]]
    out = guarded(torch.rand(3, classes, dtype=wide), side)
    assert_adds(operators, members[0], *sums, out=out)


of_triton = pytest.mark.parametrize("way", [TRITON], indirect=True)


@of_triton
@covering(classes=[10, 33], dtype=DTYPES, side=SIDES)
def test_nothing_beside_tritons_results_is_written(way, classes, dtype, side):
    """Which the operator makes by itself."""
    kernels, device = way
    if device != "cpu":
        pytest.skip("guards memory of the CPU")
    members = [guarded(z, side) for z in make((2, classes), 3, dtype)]
    labels = guarded(labels_of(members), side)
    sums = sum_dtype(dtype)
    of_rows = [(2, sums), (2, torch.int64), (2, sums), (2, sums), (2, sums)]
    mean, *rows = (
        guarded(torch.full(shape, NAN).to(of), side)
        for shape, of in [((2, classes), dtype), *(((n,), of) for n, of in of_rows)]
    )
    kernels.launch(members, None, 1.0, mean, labels=labels, summary=tuple(rows))
    ours = EnsembleStatistics(mean, *rows)
    assert_statistics_near(ours, true_statistics(members, labels), dtype)


@of_triton
def test_tritons_weights_of_fp64_lose_nothing(way):
    weights = [0.1, 1 / 3, 1.0, 0.0, 1e-9 / 7]
    parts = way[0]._parts(weights)
    assert [sum(parts[3 * i : 3 * i + 3]) for i in range(5)] == weights
    assert torch.tensor(parts).tolist() == list(parts)


@pytest.mark.skipif(not HAS_GPU, reason="4 GiB of logits")
@of_triton
def test_more_than_2_31_elements(way):
    logits = torch.zeros(2**21 + 1, 1024, dtype=torch.float16, device=way[1])
    logits[-3:] = torch.randn(3, 1024)
    mean = way[0].ensemble_softmax([logits], None, 1.0, False)
    assert_near(mean[-3:], truth([logits[-3:]]))


@needs_cpu_kernels
@covering(shape=[(9001, 10), (2001, 50), (33, 4097)], dtype=[torch.float32, torch.float16])
def test_number_of_threads_changes_no_bit(shape, dtype):
    members = make(shape, 5, dtype)
    labels = labels_of(members)

    def all_of_them():
        of_all = ensemble_statistics(members, labels, backend="cpu")
        log = ensemble_softmax(members, log=True, backend="cpu")
        return [log, *(getattr(of_all, name) for name in NAMES)]

    results = by_threads(all_of_them)
    assert all(all(map(torch.equal, results[0], other)) for other in results)


@by_ways(KERNELS, {"classes": EACH_KERNEL[:-1]}, classes=EACH_KERNEL, bad=BAD)
def test_a_bad_row_is_nan_throughout_and_no_other_is(way, classes, bad):
    """So is the NLL of a label that is no class, and nothing else of its row."""
    operators, device = way
    members = make((6, classes), 3, torch.float32, device)
    members[1][4, classes // 2 if bad != -INF else slice(None)] = bad
    labels = torch.tensor([0, -1, classes, 2**62, 0, classes - 1], device=device)
    ours = statistics_by(operators, members, labels)
    log = operators.ensemble_softmax(members, None, 1.0, True)
    assert ours.nll.isnan().tolist() == [False, True, True, True, True, False]
    assert ours.argmax[4] == 0
    good = torch.tensor([0, 1, 2, 3, 5], device=device)
    for result in (log, ours.probabilities, ours.entropy, ours.mutual_information):
        assert result[4].isnan().all()
        assert not result[good].isnan().any()
    assert ours.max_probability[4].isnan()


# As operators in a graph, and their gradients.


@covering("backend_and_device", backend_and_device=operators(), dtype=DTYPES, log=[False, True])
def test_operators_are_registered_in_full(backend, device, log, dtype):
    prefix = "triton_" if backend == "triton" else ""
    mean, statistics, add = (
        getattr(torch.ops.fastfreeze, prefix + name).default
        for name in ("ensemble_softmax", "ensemble_statistics", "softmax_add")
    )
    members = [z.requires_grad_() for z in make((2, 3, 5), 3, dtype, device)]
    labels = labels_of(members) if log else None
    detached = [z.detach() for z in members]
    for weights in (None, [0.5, 0.25, 0.25]):
        torch.library.opcheck(mean, (members, weights, 2.0, log))
        torch.library.opcheck(statistics, (detached, weights, 2.0, labels))
    out = torch.empty((2, 3, 5), dtype=sum_dtype(dtype), device=device)
    for total in (None, torch.rand_like(out)):
        for entropy in (None, torch.rand_like(out[..., 0])):
            torch.library.opcheck(add, (out, entropy, total, detached[0], 0.5, 2.0))


@covering("backend_and_device", backend_and_device=kernels(), log=[False, True], dynamic=[0, 1])
def test_compiles_in_one_graph(backend, device, log, dynamic):
    torch.compiler.reset()
    options = {"weights": [1.0, 0.5, 0.5], "temperature": 2.0}

    @torch.compile(fullgraph=True, dynamic=bool(dynamic), backend="aot_eager")
    def compiled(members, labels):
        mean = ensemble_softmax(members, log=log, backend=backend, **options)
        return mean, ensemble_statistics(members, labels, backend=backend, **options)

    members = [torch.randn(3, 8, device=device, requires_grad=True) for _ in range(3)]
    labels = labels_of(members)
    wide = [z.detach().double().requires_grad_() for z in members]
    mean, ours = compiled(members, labels)
    assert not ours.probabilities.requires_grad
    with torch.no_grad():
        assert_statistics_near(ours, true_statistics(members, labels, **options), torch.float32)
    expected = (log_truth if log else truth)(wide, **options)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
    mean.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(members[2].grad.double(), wide[2].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        members[0][1, 2] = NAN
        assert compiled(members, labels)[0].isnan().any(-1).tolist() == [False, True, False]


@covering(
    "backend_and_device",
    backend_and_device=kernels(),
    log=[False, True],
    option={"plain": (None, 1.0), "weighted, cold": ([3.0, 1.0], 0.5)},
)
def test_gradients(backend, device, option, log):
    options = {"weights": option[0], "temperature": option[1], "log": log, "backend": backend}
    members = [
        torch.randn(1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
        for _ in range(2)
    ]
    assert torch.autograd.gradcheck(lambda *z: ensemble_softmax(z, **options), members)
    assert torch.autograd.gradgradcheck(lambda *z: ensemble_softmax(z, **options), members)


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


def test_gradients_of_some_members_in_low_precision(backend, device):
    members = [z.requires_grad_() for z in make((5, 40), 3, torch.bfloat16, device)]
    members[1].requires_grad_(False)
    weight = torch.randn(5, 40, device=device)
    (ensemble_softmax(members, backend=backend).float() * weight).sum().backward()
    wide = [z.detach().double().requires_grad_() for z in members]
    (truth(wide) * weight.bfloat16().double()).sum().backward()
    assert members[1].grad is None
    for z, expected in zip(members[::2], wide[::2], strict=True):
        assert z.grad.dtype == torch.bfloat16
        torch.testing.assert_close(z.grad.double(), expected.grad, rtol=1e-2, atol=1e-4)


@covering(
    "backend_and_device",
    backend_and_device=kernels(),
    dtype=DTYPES,
    classes=[10, 100, 2001],
    option=OPTIONS,
)
def test_members_that_come_one_at_a_time(backend, device, classes, dtype, option):
    weights, temperature = option[0](5), option[1]
    members = make((1, 3, classes), 5, dtype, device)
    labels = labels_of(members)
    options = {"temperature": temperature, "backend": backend}
    plain, average = EnsembleAverage(**options), EnsembleAverage(statistics=True, **options)
    for m, (logits, weight) in enumerate(zip(members, weights or [1.0] * 5, strict=True), 1):
        plain.update(logits, weight)
        average.update(logits, weight)
        assert average.count == m
        mean = average.mean()
        assert torch.equal(mean, plain.mean())
        given = weights if weights is None else weights[:m]
        assert mean.dtype == dtype
        assert_near(mean, truth(members[:m], given, temperature))
        mean.fill_(NAN)  # what it hands out is not what it keeps
    expected = true_statistics(members, labels, weights, temperature)
    assert_statistics_near(average.statistics(labels), expected, dtype)
    assert average.statistics().nll is None
    assert torch.equal(average.mean(), average.statistics().probabilities)
    stacked = ensemble_statistics(torch.stack(members), labels.int(), weights=weights, **options)
    assert_statistics_near(stacked, expected, dtype)
    assert_near(ensemble_softmax(members, weights=weights, **options), expected.probabilities)
