"""What the Triton softmax kernel does in tiles of rows.

Without a GPU they run in Triton's interpreter. Sizes, layouts and extreme logits that do not hang
on this are in test_softmax.py and test_statistics.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax import EnsembleStatistics
from tests.conftest import HAS_GPU, kernel
from tests.covering import covering
from tests.kernels.guard import SIDES, guarded
from tests.kernels.softmax_cases import (
    BAD,
    DTYPES,
    INF,
    NAN,
    assert_logs_near,
    assert_near,
    log_truth,
    make,
    shares,
    truth,
)
from tests.kernels.test_statistics import assert_statistics_near, true_statistics

DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = kernel("triton", DEVICE).marks
SHAPES = [(1, 1), (2, 1, 17), (2, 80)]
SHAPES_OF_ITS_OWN = [(33, 2), (17, 64), (2, 2048), (2, 2049), (2, 4096)]

without_gpu = pytest.mark.skipif(HAS_GPU, reason="guards memory of the CPU")


@pytest.fixture
def kernels():
    from fastfreeze.kernels import softmax_triton

    return softmax_triton


def labels_of(members):
    classes = members[0].shape[-1]
    return torch.randint(0, classes, members[0].shape[:-1], device=DEVICE)


def statistics(kernels, members, labels=None, weights=None, temperature=1.0):
    results = kernels.ensemble_statistics(members, weights, temperature, labels)
    if labels is None:
        assert results[-1].shape == (0,)
        results = (*results[:-1], None)
    return EnsembleStatistics(*results)


@covering(
    shape=SHAPES,
    dtype=DTYPES,
    option={"plain": (None, 1.0), "weighted, cold": ([0.0, 1.0, 2.0, 3.0], 0.5)},
)
def test_against_fp64(kernels, shape, dtype, option):
    weights, temperature = option
    members = make(shape, 4, dtype, DEVICE)
    share = None if weights is None else shares(members, weights)
    mean = kernels.ensemble_softmax(members, share, temperature, False)
    assert mean.dtype == dtype
    assert_near(mean, members, weights, temperature)
    log = kernels.ensemble_softmax(members, share, temperature, True)
    assert_logs_near(log, log_truth(members, weights, temperature))
    labels = labels_of(members)
    ours = statistics(kernels, members, labels, share, temperature)
    assert_statistics_near(ours, true_statistics(members, labels, weights, temperature), dtype)


@covering(shape=SHAPES_OF_ITS_OWN, dtype=[torch.float32, torch.bfloat16])
def test_tiles_of_its_own_against_fp64(kernels, shape, dtype):
    members = make(shape, 3, dtype, DEVICE)
    labels = labels_of(members)
    assert_near(kernels.ensemble_softmax(members, None, 1.0, False), members)
    assert_logs_near(kernels.ensemble_softmax(members, None, 1.0, True), log_truth(members))
    ours = statistics(kernels, members, labels)
    assert_statistics_near(ours, true_statistics(members, labels), dtype)


@covering(shape=[(3, 10), (2, 1, 33)], dtype=DTYPES)
def test_adding_a_member(kernels, shape, dtype):
    tolerance = {"rtol": 2e-14 if dtype == torch.float64 else 2e-6, "atol": 1e-7}
    (logits,) = make(shape, 1, dtype, DEVICE)
    p = (logits.double() / 2).softmax(-1)
    own_entropy = torch.special.entr(p).sum(-1)
    for total in (None, torch.rand(shape, dtype=sum_dtype(dtype), device=DEVICE)):
        before = torch.rand(shape[:-1], dtype=sum_dtype(dtype), device=DEVICE)
        for entropy in (None, before.clone()):
            result = torch.full(shape, NAN, dtype=sum_dtype(dtype), device=DEVICE)
            kernels.softmax_add(result, entropy, total, logits, 0.3, 2.0)
            expected = 0.3 * p + (0 if total is None else total.double())
            torch.testing.assert_close(result.double(), expected, **tolerance)
            if entropy is not None:
                expected = before.double() + 0.3 * own_entropy
                torch.testing.assert_close(entropy.double(), expected, **tolerance)


@pytest.mark.parametrize("count", [1, 9, 16])
def test_any_number_of_members(kernels, count):
    members = make((3, 17), count, torch.float32, DEVICE)
    labels = labels_of(members)
    ours = statistics(kernels, members, labels)
    assert_statistics_near(ours, true_statistics(members, labels), torch.float32)
    assert_logs_near(kernels.ensemble_softmax(members, None, 1.0, True), log_truth(members))


LAYOUTS = {
    "rows apart": lambda b, c: torch.empty(b, c + 7)[:, 3 : 3 + c],
    "rows apart by vectors": lambda b, c: torch.empty(b, c + 8)[:, 4 : 4 + c],
    "unaligned": lambda b, c: torch.empty(b * c + 3)[1 : 1 + b * c].view(b, c),
    "transposed": lambda b, c: torch.empty(c, b).t(),
    "every other class": lambda b, c: torch.empty(b, 2 * c)[:, ::2],
    "batch transposed": lambda b, c: torch.empty(3, b, c).transpose(0, 1),
    "batch sliced": lambda b, c: torch.empty(3, b + 1, c)[:, :b],
}


@covering(layout=LAYOUTS, classes=[1, 5, 32])
def test_layouts(kernels, layout, classes):
    members = [layout(4, classes).fill_(NAN).to(DEVICE) for _ in range(2)]
    for z in members:
        z.copy_(torch.randn(z.shape))
    members.append(torch.randn(members[0].shape, device=DEVICE))
    labels = labels_of(members).to(DEVICE)
    ours = statistics(kernels, members, labels)
    assert_statistics_near(ours, true_statistics(members, labels), torch.float32)


def test_one_row_for_all(kernels):
    row = torch.randn(1, 40, device=DEVICE)
    members = [row.expand(9, 40)] * 3
    assert_near(kernels.ensemble_softmax(members, None, 1.0, False), members)


def test_no_rows(kernels):
    members = make((0, 10), 3, torch.float32, DEVICE)
    assert kernels.ensemble_softmax(members, None, 1.0, False).shape == (0, 10)
    ours = statistics(kernels, members, labels_of(members))
    assert ours.nll.shape == ours.argmax.shape == (0,)


@covering(bad=BAD, member=[0, 2])
def test_a_bad_row_is_nan_throughout_and_no_other_is(kernels, member, bad):
    members = make((3, 40), 3, torch.float32, DEVICE)
    members[member][1, 20 if bad != -INF else slice(None)] = bad
    good = torch.tensor([0, 2], device=DEVICE)
    labels = labels_of(members)
    kept = [z[good] for z in members]
    ours = statistics(kernels, members, labels)
    for name, of_rows in vars(ours).items():
        if name == "argmax":
            assert of_rows[1] == 0
        else:
            assert of_rows[1].isnan().all(), name
    rest = EnsembleStatistics(*(of_rows[good] for of_rows in vars(ours).values()))
    assert_statistics_near(rest, true_statistics(kept, labels[good]), torch.float32)
    log = kernels.ensemble_softmax(members, None, 1.0, True)
    assert log[1].isnan().all()
    assert_logs_near(log[good], log_truth(kept))


def test_masked_classes(kernels):
    """A part of a row all masked, for some members or all; a masked label; the rest far below 0."""
    members = make((3, 80), 3, torch.float32, DEVICE)
    for z in members:
        z.sub_(3000)[:, 32:64] = -INF
    members[0][1, :32] = -INF
    members[2][2, 64:] = -INF
    labels = torch.tensor([40, 70, 3], device=DEVICE)
    ours = statistics(kernels, members, labels)
    assert (ours.probabilities[:, 32:64] == 0).all()
    assert ours.nll[0] == INF
    assert_statistics_near(ours, true_statistics(members, labels), torch.float32)
    log = kernels.ensemble_softmax(members, None, 1.0, True)
    assert_logs_near(log, log_truth(members))


def test_a_label_that_is_no_class_has_nll_nan(kernels):
    members = make((4, 20), 3, torch.float32, DEVICE)
    labels = torch.tensor([0, -1, 20, 2**40], device=DEVICE)
    ours = statistics(kernels, members, labels)
    assert ours.nll.isnan().tolist() == [False, True, True, True]
    assert not ours.entropy.isnan().any()


def test_the_first_of_equals_is_the_argmax(kernels):
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[1, [20, 40]] = 1
    logits[2, [31, 32]] = 1
    assert statistics(kernels, [logits] * 3).argmax.tolist() == [0, 20, 31]


def test_exponentials_from_the_largest_to_the_smallest(kernels):
    gaps = torch.cat([torch.linspace(0, 104, 400), torch.tensor([103.9, 105, 1e30, 3e38, INF])])
    logits = torch.stack([torch.zeros_like(gaps), -gaps], -1).to(DEVICE)
    mean = kernels.ensemble_softmax([logits], None, 1.0, False)
    expected = logits.double().softmax(-1)
    assert ((mean.double() - expected).abs() <= 4e-7 * expected + 1.5e-45).all()


def test_weights_of_fp64_lose_nothing(kernels):
    weights = [0.1, 1 / 3, 1.0, 0.0, 1e-9 / 7]
    parts = kernels._parts(weights)
    assert [sum(parts[3 * i : 3 * i + 3]) for i in range(5)] == weights
    assert torch.tensor(parts).tolist() == list(parts)


@pytest.mark.skipif(not HAS_GPU, reason="4 GiB of logits")
def test_more_than_2_31_elements(kernels):
    logits = torch.zeros(2**21 + 1, 1024, dtype=torch.float16, device=DEVICE)
    logits[-3:] = torch.randn(3, 1024)
    mean = kernels.ensemble_softmax([logits], None, 1.0, False)
    assert_near(mean[-3:], [logits[-3:]])


@without_gpu
@covering(classes=[10, 33], dtype=DTYPES, side=SIDES)
def test_nothing_beyond_the_ends_is_read_or_written(kernels, classes, dtype, side):
    members = [guarded(z, side) for z in make((2, classes), 3, dtype)]
    labels = guarded(labels_of(members), side)

    def poisoned(shape, dtype):
        return guarded(torch.full(shape, NAN).to(dtype), side)

    sums = sum_dtype(dtype)
    of_rows = [poisoned((2,), of) for of in (sums, torch.int64, sums, sums, sums)]
    mean = poisoned((2, classes), dtype)
    kernels.launch(members, None, 1.0, mean, labels=labels, summary=tuple(of_rows))
    ours = EnsembleStatistics(mean, *of_rows)
    assert_statistics_near(ours, true_statistics(members, labels), dtype)
    total = guarded(torch.rand(2, classes, dtype=sums), side)
    entropy = guarded(torch.rand(2, dtype=sums), side)
    result = poisoned((2, classes), sums)
    kernels.softmax_add(result, entropy, total, members[0], 1.0, 1.0)
    expected = total.double() + truth(members[:1])
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


SEEDED = {
    "none": ("", ""),
    "a class too many": ("(column < classes)", "(column <= classes)"),
    "a row too many": ("mine = row < rows", "mine = row <= rows"),
}
SEEDED_RUN = """
import json, os, sys
import torch
from tests.kernels.guard import guarded

deaths = {}
for name, path in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        sys.path.insert(0, path)
        import seeded_softmax as kernels
        members = [guarded(torch.rand(3, 10)) for _ in range(2)]
        kernels.ensemble_softmax(members, None, 1.0, False)
        os._exit(0)
    deaths[name] = os.waitpid(child, 0)[1]
print(json.dumps(deaths))
"""


@without_gpu
def test_the_guard_catches_seeded_bugs(tmp_path):
    from fastfreeze.kernels import softmax_triton

    text = Path(softmax_triton.__file__).read_text()
    folders = {}
    for i, (name, (right, wrong)) in enumerate(SEEDED.items()):
        assert right in text
        folders[name] = str(tmp_path / str(i))
        file = tmp_path / str(i) / "seeded_softmax.py"
        file.parent.mkdir()
        file.write_text(text.replace(right, wrong) if right else text)
    command = [sys.executable, "-c", SEEDED_RUN, json.dumps(folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    deaths = json.loads(run.stdout)
    assert deaths.pop("none") == 0, run.stderr
    assert {name: os.WTERMSIG(status) for name, status in deaths.items()} == dict.fromkeys(
        deaths, signal.SIGSEGV
    )
