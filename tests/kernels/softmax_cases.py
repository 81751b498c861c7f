"""The softmax operators' cases and truths, and the ways in which they can be computed here."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch

from fastfreeze.kernels import reference
from fastfreeze.kernels.softmax import EnsembleStatistics
from tests.conftest import HAS_GPU, ISAS, LEVELS, kernel, needs_cpu_kernels
from tests.kernels.conftest import rows_apart
from tests.kernels.emulation.softmax import emulated_softmax

NAN, INF = math.nan, math.inf
NAMES = list(EnsembleStatistics.__annotations__)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# [B, C]: a row to a lane up to 16 classes, groups of rows up to 2048, blocks above.
SHAPES = [(0, 10), (1, 2), (33, 2), (33, 10), (3, 16), (33, 17), (1, 31), (33, 32), (3, 33)]
SHAPES += [(33, 100), (3, 1000), (1, 2047), (3, 2048), (1, 2049), (3, 4097), (2, 3, 7)]
COUNTS = [1, 2, 3, 8, 9, 16, 17]  # of members: the CPU's come by 16
# Weights of so many members, and a temperature.
OPTIONS = {
    "plain": (lambda n: None, 1.0),
    "weighted": (lambda n: [1 / (1 + m) for m in range(n)], 1.0),
    "some weights 0": (lambda n: [float(m % 2 == 0) for m in range(n)], 1.0),
    "cold": (lambda n: None, 0.5),
    "hot and weighted": (lambda n: [1.0 + m for m in range(n)], 3.0),
}
BAD = [NAN, INF, -INF]
# Relative, and absolute for what underflows. 16-bit results are rounded once: half a unit.
TOLERANCE = {
    torch.float64: (1e-14, 0.0),
    torch.float32: (4e-6, 2e-45),
    torch.float16: (2.0**-11 * 1.01, 2.0**-25 * 1.01),
    torch.bfloat16: (2.0**-8 * 1.01, 0.0),
}

# Ways: by a name that ends with the device, what makes ensemble_softmax, ensemble_statistics and
# softmax_add as the operators are.
OPERATORS = ("ensemble_softmax", "ensemble_statistics", "softmax_add")


def registered(prefix):
    return SimpleNamespace(**{n: getattr(torch.ops.fastfreeze, prefix + n) for n in OPERATORS})


def by_reference(_):
    def softmax_add(result, entropy, total, logits, weight, temperature):
        if entropy is not None:
            p = torch.softmax(reference.scaled_reference(logits, temperature), dim=-1)
            entropy += weight * reference.entropy_reference(p)
        result.copy_(reference.softmax_add_reference(total, logits, weight, temperature))

    return SimpleNamespace(
        ensemble_softmax=reference.ensemble_softmax_reference,
        ensemble_statistics=reference.ensemble_statistics_reference,
        softmax_add=softmax_add,
    )


def at_level(level):
    def make(_):
        torch.ops.fastfreeze.cpu_isa(level)
        return registered("")

    return make


def by_triton(_):
    return importlib.import_module("fastfreeze.kernels.softmax_triton")


def way(name, make, device, marks=()):
    return pytest.param((make, device), marks=marks, id=f"{name}-{device}")


DEVICE = "cuda" if HAS_GPU else "cpu"
TRITON = way("triton", by_triton, DEVICE, kernel("triton", DEVICE).marks)
CPU = [
    way(f"cpu-{p.id}", at_level(LEVELS.index(p.id)), "cpu", [needs_cpu_kernels, *p.marks])
    for p in ISAS
]
if HAS_GPU:
    CUDA = way("cuda", lambda _: registered(""), "cuda", kernel("cuda", "cuda").marks)
else:
    CUDA = pytest.param((emulated_softmax, "cpu"), id="cuda-emulated")
KERNELS = [*CPU, CUDA]
WAYS = [way("reference", by_reference, DEVICE), *KERNELS]


def by_ways(ways, triton, **tables):
    """A test's rows over ways and tables; triton: what Triton has in their place, taking less."""
    rows = rows_apart("way", ways, **tables) + rows_apart("way", [TRITON], **{**tables, **triton})
    return pytest.mark.parametrize(("way", *tables), rows, indirect=["way"])


def make(shape, members, dtype, device="cpu"):
    return [
        torch.randn(shape, dtype=torch.float64).mul(4).to(dtype).to(device) for _ in range(members)
    ]


def labels_of(members):
    classes = members[0].shape[-1]
    return torch.randint(0, classes, members[0].shape[:-1], device=members[0].device)


def shares(members, weights):
    weights = [1.0] * len(members) if weights is None else weights
    return [w / sum(weights) for w in weights]


def truth(members, weights=None, temperature=1.0):
    return sum(
        w * (z.double() / temperature).softmax(-1)
        for w, z in zip(shares(members, weights), members, strict=True)
    )


def log_truth(members, weights=None, temperature=1.0):
    logs = [
        (z.double() / temperature).log_softmax(-1) + (math.log(w) if w else -INF)
        for w, z in zip(shares(members, weights), members, strict=True)
    ]
    return torch.stack(logs).logsumexp(0)


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


def assert_near(ours, expected):
    """Probabilities."""
    relative, absolute = TOLERANCE[ours.dtype]
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    error = (ours.double() - expected).abs() - absolute
    assert (error <= relative * expected).all(), (error / expected).max()


def assert_logs_near(ours, expected):
    """Of numbers from 0 to -inf, those near 0 to a share of 1."""
    relative = TOLERANCE[ours.dtype][0]
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    assert torch.equal(ours == -INF, expected == -INF)
    finite = expected != -INF
    error = (ours.double() - expected).abs()[finite]
    assert (error <= relative * (1 + expected[finite].abs())).all(), error.max()


def assert_statistics_near(ours, expected, dtype):
    """All but probabilities are sums in float32 (float64) of terms of about 1."""
    wide = reference.sum_dtype(dtype)
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
    assert_near(ours.probabilities, expected.probabilities)
    chosen = expected.probabilities.gather(-1, ours.argmax[..., None])[..., 0]
    torch.testing.assert_close(chosen, expected.max_probability, rtol=tolerance, atol=0)
    assert (ours.mutual_information >= 0).all()
    assert (ours.entropy >= 0).all()


def statistics_by(operators, members, labels=None, weights=None, temperature=1.0):
    results = operators.ensemble_statistics(members, weights, temperature, labels)
    if labels is None:
        assert results[-1].shape == (0,)
        results = (*results[:-1], None)
    return EnsembleStatistics(*results)


def assert_right(operators, members, labels=None, weights=None, temperature=1.0):
    """All three operators against fp64; labels: made if None, left out if False."""
    dtype = members[0].dtype
    labels = labels_of(members) if labels is None else labels
    labels = None if labels is False else labels
    of_all = (None if weights is None else shares(members, weights), temperature)
    mean = operators.ensemble_softmax(members, *of_all, False)
    assert (mean.dtype, mean.device) == (dtype, members[0].device)
    assert_near(mean, truth(members, weights, temperature))
    log = operators.ensemble_softmax(members, *of_all, True)
    assert log.dtype == dtype
    assert_logs_near(log, log_truth(members, weights, temperature))
    ours = statistics_by(operators, members, labels, *of_all)
    assert_statistics_near(ours, true_statistics(members, labels, weights, temperature), dtype)
    assert_adds(operators, members[-1], None, None, temperature)
    total = torch.rand_like(ours.probabilities, dtype=reference.sum_dtype(dtype))
    assert_adds(operators, members[-1], total, torch.rand_like(total[..., 0]), temperature)


def assert_adds(operators, logits, total, entropy, temperature=1.0, out=None):
    """A member of the weight 0.3, into memory that holds NaN, or ``out``."""
    wide = reference.sum_dtype(logits.dtype)
    result = torch.empty(logits.shape, dtype=wide, device=logits.device) if out is None else out
    before = 0 if entropy is None else entropy.clone().double()
    operators.softmax_add(result.fill_(NAN), entropy, total, logits, 0.3, temperature)
    p = truth([logits], None, temperature)
    assert_near(result, (0 if total is None else total.double()) + 0.3 * p)
    if entropy is not None:
        expected = before + 0.3 * torch.special.entr(p).sum(-1)
        tolerance = 1e-13 if wide == torch.float64 else 2e-6
        torch.testing.assert_close(entropy.double(), expected, rtol=tolerance, atol=tolerance)
